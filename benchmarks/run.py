"""The benchmark suite: kdx against the eager path and against everyone.

    python -m benchmarks.run                 every case, and stores them in benchmarks/results/suite.jsonl
    python -m benchmarks.run --quick         a few, in three minutes on two cores; nothing is stored
    python -m benchmarks.run --case TEXT     those whose name contains TEXT
    python -m benchmarks.run --against FILE  whether a ratio has become worse than the stored one; nothing is stored

Each way of a case runs in a process of its own (`benchmarks.workers`): once, and what the ways return is compared and their processes'
peak memory read; then twice to warm up; then in paired rounds of alternating order. Ratios are of the two times of one
round. A case that fails is told, and the others go on; the status is then 1.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import cold, explain, geometry, gradients, imputation, limits, scores
from benchmarks.cases import CASES, Case
from benchmarks.record import RESULTS, child, origin, quartiles, ratio
from benchmarks.subject import Subject, Work
from benchmarks.workers import Worker, paired, serve

MODULE = "benchmarks.run"
SUITE = RESULTS / "suite.jsonl"
ROUNDS, QUICK_ROUNDS = 5, 3
WORSE = 1.1
"""A ratio is worse where its quartiles and the stored ones are this far apart."""


@dataclass(frozen=True)
class Kind:
    """subject: from a folder and a case's arguments. prepare: what fills the folder, once a case, in a process of its own."""

    subject: Callable[..., Subject]
    prepare: Callable[..., None] | None = None


KINDS = {
    "explain": Kind(explain.subject, explain.prepare),
    "geometry": Kind(geometry.subject),
    "scores": Kind(scores.one_score),
    "estimators": Kind(scores.estimators),
    "beside dcor": Kind(scores.beside_dcor),
    "permutations": Kind(scores.permutations),
    "batches": Kind(scores.batches),
    "imputation": Kind(imputation.subject),
    "gradients": Kind(gradients.subject, gradients.prepare),
    "export": Kind(gradients.export),
    "cold start": Kind(cold.subject, cold.prepare),
}


def run_case(case: Case, rounds: int, of: Mapping[str, float]) -> dict[str, Any]:
    """The record of one case, without its origin. of: the machine's limits. Raises CalledProcessError where one of its processes fails."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        arguments = ("--kind", case.kind, "--given", json.dumps(dict(case.given)), "--folder", folder)
        if KINDS[case.kind].prepare is not None:
            child(MODULE, "--child", "prepare", *arguments)
        told = child(MODULE, "--child", "ways", *arguments)
        opening = {way: held.enter_context(Worker(MODULE, "--child", "way", "--way", way, *arguments)) for way in told["ways"]}
        reasons = {way: worker.opened() for way, worker in opening.items()}
        workers = {way: worker for way, worker in opening.items() if reasons[way] is None}
        first = {way: worker.run(Path(folder) / f"{number}.result") for number, (way, worker) in enumerate(workers.items())}
        found = {
            "figures": child(MODULE, "--child", "check", *arguments, "--ran", json.dumps(list(workers))),
            "missing": {way: reason for way, reason in reasons.items() if reason is not None},
            "samples": paired({way: partial(_seconds, worker) for way, worker in workers.items()}, case.rounds or rounds),
            "peak_bytes": {way: one["peak_bytes"] for way, one in first.items()},
        }
    samples, work = found["samples"], told["work"]
    ratios = {way: ratio(samples, way, case.over) for way in samples if way != case.over and case.over in samples}
    record: dict[str, Any] = {"case": case.name, "kind": case.kind, "given": dict(case.given), "over": case.over, "ours": case.ours}
    record |= {**found, "ratios": ratios}
    if work is not None:
        floors = {way: limits.floor(Work(**work), of, bfloat16="bf16" in way) for way in samples}
        record |= {"work": work, "over_floor": {way: quartiles(values)[1] / floors[way] for way, values in samples.items()}}
    return {**record, "goals": [_held(goal, case, ratios) for goal in case.goals], "limits": dict(of)}


def _seconds(worker: Worker) -> float:
    return worker.run()["seconds"]


def _held(goal: tuple[str, str, float], case: Case, ratios: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    way, bound, wanted = goal
    found = ratios[way][1] if way in ratios else None
    holds = None if found is None else found >= wanted if bound == "least" else found <= wanted
    return {"ratio": f"{way} over {case.over}", "bound": bound, "wanted": wanted, "found": found, "holds": holds}


# ---- a child ----


def work_alone(options: argparse.Namespace, answer: Callable[[Any], None]) -> None:
    """What one process of a case does: prepares it, names its ways, runs one of them, or compares what they returned."""
    kind, folder, given = KINDS[options.kind], options.folder, json.loads(options.given)
    if options.child == "prepare":
        assert kind.prepare is not None
        kind.prepare(folder, **given)
        answer(None)
        return
    subject = kind.subject(folder, **given)
    if options.child == "ways":
        answer({"ways": list(subject.ways), "work": None if subject.work is None else vars(subject.work())})
    elif options.child == "way":
        serve(partial(subject.opened, options.way), answer)
    else:
        ran = json.loads(options.ran)
        answer(subject.check({way: pickle.loads((folder / f"{number}.result").read_bytes()) for number, way in enumerate(ran)}))


# ---- what is said and stored ----


def tell(record: Mapping[str, Any], console: Console) -> None:
    table = Table(
        "", "median", f"over {record['over']}" if record["over"] else "", "over the floor", "peak", title=record["case"], box=None
    )
    for way, values in record["samples"].items():
        low, middle, high = record["ratios"].get(way, (None,) * 3)
        table.add_row(
            way,
            f"{quartiles(values)[1]:.3g} s",
            "" if middle is None else f"{middle:.3g} ({low:.3g} to {high:.3g})",
            f"{record['over_floor'][way]:.3g}" if "over_floor" in record else "",
            f"{record['peak_bytes'][way] / 1e9:.2f} GB",
        )
    console.print(table)
    for way, why in record["missing"].items():
        console.print(f"  {way} cannot run here. {why}", style="dim", highlight=False)
    for name, value in record["figures"].items():
        console.print(f"  {name}: {value if isinstance(value, str | int) else format(value, '.1e')}", style="dim", highlight=False)
    for goal in record["goals"]:
        if goal["found"] is not None:
            said = "holds" if goal["holds"] else "does not hold"
            console.print(f"  {goal['ratio']}: {goal['found']:.3g}, at {goal['bound']} {goal['wanted']:.3g} is wanted: {said}")
    console.print()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The stored records by case, the newest of each."""
    if not path.exists():
        return {}
    records = (json.loads(line) for line in path.read_text().splitlines())
    return {record["case"]: record for record in records}


def keep(record: Mapping[str, Any]) -> None:
    """Store a record in place of the case's last one."""
    records = read(SUITE) | {record["case"]: record}
    known = [case.name for case in CASES]
    RESULTS.mkdir(exist_ok=True)
    half = SUITE.with_suffix(".part")
    half.write_text("".join(json.dumps(records[name]) + "\n" for name in known if name in records))
    half.replace(SUITE)


def worse(record: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterable[str]:
    """A line for each way of kdx's that ran then and does not now, or whose ratio is more than the stored one by `WORSE`, quartiles
    apart, and for each other way whose ratio to kdx's is less."""
    over, ours = record["over"], tuple(record["ours"])
    for way in stored["samples"]:
        if way.startswith(ours) and way not in record["samples"]:
            yield f"{record['case']}: {way} does not run: {record['missing'].get(way, 'it is gone')}"
    for way, (was_low, was, was_high) in stored["ratios"].items():
        if way not in record["ratios"]:
            continue
        low, middle, high = record["ratios"][way]
        slower = way.startswith(ours) and low > was_high * WORSE
        if slower or (not way.startswith(ours) and over.startswith(ours) and high * WORSE < was_low):
            yield f"{record['case']}: {way} over {over} was {was:.3g} and is {middle:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a few cases, in three minutes on two cores; nothing is stored")
    which.add_argument("--full", action="store_true", help="every case (the default), with --rounds")
    which.add_argument("--case", action="append", metavar="TEXT", help="the cases whose name contains TEXT; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--rounds", type=int, help=f"paired rounds; {ROUNDS}, or {QUICK_ROUNDS} of --quick")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="a suite.jsonl; status 1 where a ratio has become worse; stores nothing"
    )
    for hidden in ("--child", "--kind", "--given", "--way", "--ran"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        answers = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # libraries print too
            work_alone(options, lambda found: print(json.dumps(found), file=answers, flush=True))
        return
    chosen = [case for case in CASES if (case.quick or not options.quick) and any(text in case.name for text in options.case or [""])]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    if not chosen:
        parser.error(f"no case has {' or '.join(options.case)} in its name; --list names them")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    stored = read(options.against) if options.against else {}
    if options.against and not stored:
        parser.error(f"{options.against} holds no results")
    sys.exit(run_all(chosen, options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS), stored, store=not (options.quick or stored)))


def run_all(cases: Sequence[Case], rounds: int, stored: Mapping[str, dict[str, Any]], *, store: bool) -> int:
    """The exit status: 1 where a case failed or has become worse than ``stored``."""
    console, start, begun = Console(), time.perf_counter(), origin(MODULE)
    of = limits.limits()
    console.print(
        f"Limits: {of['operations'] / 1e9:.0f} GFLOP/s in float32 ({of['operations, one thread'] / 1e9:.0f} on one thread, "
        f"{of['operations, bf16'] / 1e9:.0f} in bfloat16), {of['bytes'] / 1e9:.0f} GB/s.\n"
    )
    lost: list[str] = []
    for case in cases:
        try:
            record = run_case(case, rounds, of) | begun
        except subprocess.CalledProcessError:
            lost.append(f"{case.name}: failed; what it said stands above")
            continue
        tell(record, console)
        if store:
            keep(record)
        lost += worse(record, stored[case.name]) if case.name in stored else []
    console.print(f"{len(cases)} cases in {time.perf_counter() - start:.0f} s.")
    for line in lost:
        console.print(line, highlight=False)
    return 1 if lost else 0


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
