"""The benchmark suite: kdx compared with the published method, with careful implementations of it, and with other libraries.

    python -m benchmarks.run                 every case; stores the results in benchmarks/results/suite.jsonl
    python -m benchmarks.run --quick         a few cases, in three minutes on two cores; stores nothing
    python -m benchmarks.run --case TEXT     the cases whose name contains TEXT
    python -m benchmarks.run --against FILE  reports each ratio that is worse than the stored one; stores nothing

Each variant of a case runs in a process of its own (`benchmarks.workers`). It first runs once: the results of the variants are compared
and the peak memory of their processes is read. It then runs twice to warm up, and then in paired rounds of alternating order. Ratios are
those of two times in one round. If a case fails, the suite reports it, runs the other cases, and ends with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import cold, decomposition, explain, geometry, gradients, imputation, limits, neighbours, scores, stored
from benchmarks.cases import CASES, PROCESS_KINDS, Case
from benchmarks.comparison import Comparison, Work
from benchmarks.record import child, origin, quartiles, ratio
from benchmarks.workers import Worker, paired, serve

MODULE = "benchmarks.run"
ROUNDS, QUICK_ROUNDS = 5, 3


@dataclass(frozen=True)
class Kind:
    """compare: takes a folder and a case's arguments. prepare: fills the folder, once per case, in a process of its own."""

    compare: Callable[..., Comparison]
    prepare: Callable[..., None] | None = None


KINDS = {
    "explain": Kind(explain.comparison, explain.prepare),
    "geometry": Kind(geometry.comparison),
    "decomposition": Kind(decomposition.comparison),
    "scores": Kind(scores.one_score),
    "estimators": Kind(scores.estimators),
    "beside dcor": Kind(scores.beside_dcor),
    "permutations": Kind(scores.permutations),
    "batches": Kind(scores.batches),
    "neighbours of unicam": Kind(neighbours.unicam),
    "neighbours of compare": Kind(neighbours.compare),
    "imputation": Kind(imputation.comparison),
    "gradients": Kind(gradients.comparison, gradients.prepare),
    "export": Kind(gradients.export),
    "cold start": Kind(cold.first_maps, cold.prepare),
    "process start": Kind(cold.process_start),
}


def run_case(case: Case, rounds: int, machine: Mapping[str, float]) -> dict[str, Any]:
    """The record of one case, without its origin. machine: the limits of `benchmarks.limits`.

    Raises CalledProcessError if one of the case's processes fails.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as resources:
        arguments = ("--kind", case.kind, "--arguments", json.dumps(dict(case.arguments)), "--folder", folder)
        if KINDS[case.kind].prepare is not None:
            child(MODULE, "--child", "prepare", *arguments)
        listing = child(MODULE, "--child", "list", *arguments)
        started = {
            name: resources.enter_context(Worker(MODULE, "--child", "variant", "--variant", name, *arguments))
            for name in listing["variants"]
        }
        reasons = {name: worker.opened() for name, worker in started.items()}
        workers = {name: worker for name, worker in started.items() if reasons[name] is None}
        first_runs = {name: worker.run(Path(folder) / f"{number}.result") for number, (name, worker) in enumerate(workers.items())}
        measurement = {
            "figures": child(MODULE, "--child", "check", *arguments, "--ran", json.dumps(list(workers))),
            "missing": {name: reason for name, reason in reasons.items() if reason is not None},
            "samples": paired({name: partial(_seconds, worker) for name, worker in workers.items()}, case.rounds or rounds),
            "peak_bytes": {name: run["peak_bytes"] for name, run in first_runs.items() if case.kind not in PROCESS_KINDS},
        }
    return _record(case, measurement, listing["work"], machine)


def _seconds(worker: Worker) -> float:
    return worker.run()["seconds"]


def _record(case: Case, measurement: Mapping[str, Any], work: Mapping[str, float] | None, machine: Mapping[str, float]) -> dict[str, Any]:
    """A case's stored record. Its keys are those of the first stored results, which are older than the names in the code."""
    samples, baseline = measurement["samples"], case.baseline
    ratios = {name: ratio(samples, name, baseline) for name in samples if name != baseline and baseline in samples}
    record: dict[str, Any] = {"case": case.name, "kind": case.kind, "given": dict(case.arguments)}
    record |= {"over": baseline, "ours": case.kdx_variants, **measurement, "ratios": ratios}
    if work is not None:
        bounds = {name: limits.lower_bound(Work(**work), machine, bfloat16="bf16" in name) for name in samples}
        record |= {"work": work, "over_floor": {name: quartiles(seconds)[1] / bounds[name] for name, seconds in samples.items()}}
    return {**record, "goals": [goal.judged(baseline, samples) for goal in case.goals], "limits": dict(machine)}


def serve_child(options: argparse.Namespace, answer: Callable[[Any], None]) -> None:
    """The work of one process of a case: prepare it, list its variants, run one of them, or compare their results."""
    kind, folder, arguments = KINDS[options.kind], options.folder, json.loads(options.arguments)
    if options.child == "prepare":
        assert kind.prepare is not None
        kind.prepare(folder, **arguments)
        answer(None)
        return
    comparison = kind.compare(folder, **arguments)
    if options.child == "list":
        answer({"variants": list(comparison.variants), "work": None if comparison.work is None else vars(comparison.work())})
    elif options.child == "variant":
        serve(partial(comparison.open, options.variant), answer)
    else:
        names = json.loads(options.ran)
        results = {name: pickle.loads((folder / f"{number}.result").read_bytes()) for number, name in enumerate(names)}
        answer(comparison.check(results))


def show(record: Mapping[str, Any], console: Console) -> None:
    """Print a case's record."""
    relative = f"relative to {record['over']}" if record["over"] else ""
    table = Table("", "median", relative, "relative to the lower bound", "peak memory", title=record["case"], box=None)
    for name, seconds in record["samples"].items():
        low, median, high = record["ratios"].get(name, (None,) * 3)
        table.add_row(
            name,
            f"{quartiles(seconds)[1]:.3g} s",
            "" if median is None else f"{median:.3g} ({low:.3g} to {high:.3g})",
            f"{record['over_floor'][name]:.3g}" if "over_floor" in record else "",
            f"{record['peak_bytes'][name] / 1e9:.2f} GB" if name in record["peak_bytes"] else "",
        )
    console.print(table)
    for name, reason in record["missing"].items():
        console.print(f"  {name} cannot run here. {reason}", style="dim", highlight=False)
    for name, value in record["figures"].items():
        console.print(f"  {name}: {value if isinstance(value, str | int) else format(value, '.1e')}", style="dim", highlight=False)
    for goal in record["goals"]:
        if goal["found"] is not None:
            bound = f"at {goal['bound']} {goal['wanted']:.3g}{goal['unit']}"
            verdict = "reached" if goal["holds"] else "missed"
            console.print(f"  {goal['ratio']}: {goal['found']:.3g}{goal['unit']}; the goal of {bound} is {verdict}")
    console.print()


def run_all(cases: Sequence[Case], rounds: int, reference: Mapping[str, dict[str, Any]], *, store: bool) -> int:
    """Run the cases. Returns the exit status: 1 if a case failed or is worse than its record in ``reference``."""
    console, start, provenance = Console(), time.perf_counter(), origin(MODULE)
    machine = limits.limits()
    console.print(
        f"Limits: {machine['operations'] / 1e9:.0f} GFLOP/s in float32 ({machine['operations, one thread'] / 1e9:.0f} on one thread, "
        f"{machine['operations, bf16'] / 1e9:.0f} in bfloat16), {machine['bytes'] / 1e9:.0f} GB/s.\n"
    )
    problems: list[str] = []
    for case in cases:
        try:
            record = run_case(case, rounds, machine) | provenance
        except subprocess.CalledProcessError:
            problems.append(f"{case.name}: failed; its own message is above")
            continue
        show(record, console)
        if store:
            stored.store(record)
        problems += stored.worse(record, reference[case.name]) if case.name in reference else []
    console.print(f"{len(cases)} {'case' if len(cases) == 1 else 'cases'} in {time.perf_counter() - start:.0f} s.")
    for line in problems:
        console.print(line, highlight=False)
    return 1 if problems else 0


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    selection = arguments.add_mutually_exclusive_group()
    selection.add_argument("--quick", action="store_true", help="a few cases, in three minutes on two cores; stores nothing")
    selection.add_argument("--full", action="store_true", help="every case (the default), with --rounds")
    selection.add_argument("--case", action="append", metavar="TEXT", help="the cases whose name contains TEXT; repeatable")
    arguments.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    arguments.add_argument("--rounds", type=int, help=f"paired rounds (default {ROUNDS}, or {QUICK_ROUNDS} with --quick)")
    arguments.add_argument(
        "--against", type=Path, metavar="FILE", help="a suite.jsonl; status 1 if a ratio is worse than its; stores nothing"
    )
    for hidden in ("--child", "--kind", "--arguments", "--variant", "--ran"):
        arguments.add_argument(hidden, help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return arguments


def main() -> None:
    arguments = parser()
    options = arguments.parse_args()
    if options.child is not None:
        answers = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # libraries print too
            serve_child(options, lambda answer: print(json.dumps(answer), file=answers, flush=True))
        return
    cases = [case for case in CASES if (case.quick or not options.quick) and any(text in case.name for text in options.case or [""])]
    if options.list:
        print("\n".join(case.name for case in cases))
        return
    if not cases:
        arguments.error(f"no case has {' or '.join(options.case)} in its name; --list prints the names")
    if options.rounds is not None and options.rounds < 1:
        arguments.error("--rounds must be 1 or more")
    reference = stored.read(options.against) if options.against else {}
    if options.against and not reference:
        arguments.error(f"{options.against} holds no results")
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    sys.exit(run_all(cases, rounds, reference, store=not (options.quick or reference)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
