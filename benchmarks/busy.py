"""Runs every main case of the suite on an idle machine and beside as many busy processes as there are cores.

    python -m benchmarks.busy                 every main case; stores the results in benchmarks/results/busy.json
    python -m benchmarks.busy --case TEXT     the cases whose name contains TEXT; stores nothing

Only kdx's own variants run, each in a process of its own, in paired rounds: once alone and once beside the busy processes, which are
stopped in between. If two threads share each core, a fair share takes twice the time. The goal is at most GOAL times. The machine must be
idle otherwise. The record states the number of threads (`environment`, `threads`), as the manifest of every run does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import run as suite
from benchmarks.cases import CASES, Case
from benchmarks.neighbours import Neighbours
from benchmarks.record import child, quartiles, ratio, store
from benchmarks.workers import Worker, paired

MODULE = "benchmarks.busy"
GOAL = 2.5
ROUNDS = 3
KINDS = frozenset({"explain", "geometry", "decomposition", "scores", "permutations", "batches", "imputation", "gradients"})
"""The kinds of the main cases: those that compute in one process."""

IDLE, BUSY = "alone", "beside busy processes"


def main_cases(texts: Sequence[str]) -> list[Case]:
    """The main cases whose name contains one of the texts."""
    return [case for case in CASES if case.kind in KINDS and any(text in case.name for text in texts)]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Per variant of kdx: the seconds alone and beside busy processes, and the quartiles of their ratio."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as resources:
        arguments = ("--kind", case.kind, "--arguments", json.dumps(dict(case.arguments)), "--folder", folder)
        if suite.KINDS[case.kind].prepare is not None:
            child(suite.MODULE, "--child", "prepare", *arguments)
        neighbours = resources.enter_context(Neighbours())

        def alone(worker: Worker) -> float:
            return worker.run()["seconds"]

        def beside(worker: Worker) -> float:
            with neighbours.running():
                return worker.run()["seconds"]

        for name in child(suite.MODULE, "--child", "list", *arguments)["variants"]:
            if not name.startswith(case.kdx_variants):
                continue
            with Worker(suite.MODULE, "--child", "variant", "--variant", name, *arguments) as worker:
                if worker.opened() is None:
                    samples = paired({IDLE: partial(alone, worker), BUSY: partial(beside, worker)}, rounds)
                    rows[name] = {"samples": samples, "ratio": ratio(samples, BUSY, IDLE)}
    return {"case": case.name, "kind": case.kind, "given": dict(case.arguments), "variants": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="TEXT", help="the cases whose name contains TEXT; repeatable; stores nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    cases = main_cases(options.case or [""])
    if not cases:
        parser.error(f"no main case has {' or '.join(options.case)} in its name")
    table, rows, console = Table("case", IDLE, BUSY, "ratio", box=None), [], Console()
    for case in cases:
        try:
            rows.append(measure(case, options.rounds))
        except subprocess.CalledProcessError:  # it needs a package that is missing or does not load
            console.print(f"{case.name} does not run here.")
            continue
        for name, row in rows[-1]["variants"].items():
            times = (f"{quartiles(row['samples'][condition])[1]:.3g} s" for condition in (IDLE, BUSY))
            low, median, high = row["ratio"]
            table.add_row(f"{case.name}: {name}", *times, f"{median:.2f} ({low:.2f} to {high:.2f})")
        if not options.case:  # a run that is stopped has stored its complete cases
            store("busy", MODULE, {"goal": GOAL, "cases": rows})
    console.print(table)
    missed = [f"{row['case']}: {name}" for row in rows for name, variant in row["variants"].items() if variant["ratio"][1] > GOAL]
    console.print(f"The goal of at most {GOAL} times is missed by: {', '.join(missed) or 'none'}.", highlight=False)


if __name__ == "__main__":
    main()
