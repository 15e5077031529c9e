"""Train and measure the networks of docs/evidence.md: whether the claims of the paper hold where the objects are known.

    python -m benchmarks.evidence --out FOLDER                                  everything; writes results/evidence.json
    python -m benchmarks.evidence --out FOLDER --minutes 9 --record FILE        stop after 9 minutes at most, and store FILE
    python -m benchmarks.evidence --out FOLDER --toy                            tiny networks, to test the command

The grids are the two studies in benchmarks/studies. Their jobs are those of ``kdx study``, except that a cell is measured by
`benchmarks.evidence_measuring` instead of explained. Seeds are computed in order on both data sets, and the record contains the seeds
that are complete on a data set. A run that was stopped continues with the same command. Seeds that an earlier record contains are not
computed, so that several machines can share the work; each seed states its own. `benchmarks.evidence_tables` draws conclusions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.evidence_cells import MEASURED, Subject, measurements_file, measuring_device, perform, subjects_of
from benchmarks.evidence_design import DATA, design, draw
from benchmarks.record import RESULTS, origin
from kdx import threads
from kdx.commands.study import complete_jobs, write_done
from kdx.disk import lock_folder, write_atomic
from kdx.study.grid import Grid, grid_of
from kdx.study.schedule import run_jobs

IMAGES = 480
"""The test images whose maps and scores are compared, where a data set has so many."""


class TimeIsUp(BaseException):  # not an Exception, which would end only the job
    """The time limit of the command is reached."""


# ---- the record


def record_of(folder: Path, grids: Mapping[str, Grid], subjects: Mapping[str, Subject], complete: set[str]) -> list[dict[str, Any]]:
    """The measurements of each seed on each data set, for the seeds whose cells are all complete."""
    cells: dict[tuple[str, int], list[str]] = defaultdict(list)
    for data, grid in grids.items():
        for cell in grid.cells:
            cells[data, cell.seed].append(cell.key)
    folders = {job.key: job.folder for grid in grids.values() for job in grid.jobs}
    runs = []
    for (data, seed), keys in cells.items():
        if not complete.issuperset(keys):
            continue
        run: dict[str, Any] = {"data": data, "seed": seed, "accuracy": {}, "students": {}}
        for key in keys:
            stored, student = json.loads((folder / folders[key] / MEASURED).read_text()), subjects[key].student
            accuracy = stored["accuracy"]
            run["accuracy"] |= {student.teacher: accuracy["teacher"], "base": accuracy["base"], student.name: accuracy["student"]}
            run["students"][student.name] = stored["layers"]
            run["images"] = stored["images"]
            if "detailed" in stored:
                run["detailed"] = stored["detailed"]
        runs.append(run)
    return runs


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write the record with six significant digits, and a line per seed."""
    head = {key: value for key, value in content.items() if key != "runs"}
    lines = ",\n".join(json.dumps(_rounded(run), separators=(",", ":")) for run in content["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f'{json.dumps(head, indent=1)[:-2]},\n "runs": [\n{lines}\n]}}\n'.encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---- the command


@dataclass
class _Progress:
    """The complete jobs and seeds, and the time that is left."""

    start: float
    minutes: float | None
    total: int
    ended: int = 0
    failed: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def check(self, *_: object) -> None:
        """Raise `TimeIsUp` when the time limit is reached. Every note of a job calls this."""
        if self.minutes is not None and self.seconds > 60 * self.minutes:
            raise TimeIsUp


def run(options: argparse.Namespace) -> Path:
    """Run the missing jobs and write the record of the complete seeds. Returns the path of the record."""
    start, folder = time.monotonic(), options.out.absolute()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {line}", flush=True)

    with lock_folder(folder):
        draw("composites", folder, toy=options.toy, workers=options.workers)
        say("The images are drawn.")
        device = measuring_device(options.device, say)
        grids = {name: grid_of(design(name, folder, toy=options.toy)) for name in DATA}
        parameters = {name: grid.parameters for name, grid in grids.items()}
        path = options.record
        earlier = {(run["data"], run["seed"]): run for run in _runs(path, parameters)}
        jobs = [job for name in options.data for job in grids[name].jobs if (name, job.settings.seed) not in earlier]
        jobs = sorted((job for job in jobs if job.settings.seed < options.seeds), key=lambda job: job.settings.seed)
        subjects = subjects_of(grids)
        complete = set(complete_jobs(folder, jobs, measurements_file))
        state = _Progress(start, options.minutes, len(jobs) - len(complete))
        say(f"{len(jobs)} jobs, {state.total} of them to do, with {options.workers} processes; measurements on {device}.")
        action = partial(perform, subjects=subjects, images=options.images, device=device)
        outcomes = run_jobs(jobs, action, folder, workers=options.workers, threads=1, on_note=state.check, complete=frozenset(complete))
        source = origin("benchmarks.evidence")
        machine = {**source["environment"], "commit": source["commit"], "device": device}

        def store() -> int:
            computed = record_of(folder, grids, subjects, complete)
            runs = {**earlier, **{(run["data"], run["seed"]): {**run, "machine": machine} for run in computed}}
            facts = {"images": options.images, "toy": options.toy, "seconds": round(state.seconds)}
            write_record(path, {**source, **facts, "parameters": parameters, "runs": [runs[key] for key in sorted(runs)]})
            return len(runs)

        try:
            for outcome in outcomes:
                state.ended += 1
                if outcome.problem:
                    state.failed += 1
                    say(f"{outcome.job.key} failed: {outcome.problem} {outcome.hint}")
                else:
                    write_done(folder, outcome)
                    complete.add(outcome.job.key)
                    say(f"{state.ended}/{state.total} {outcome.job.kind} {outcome.job.key}: {outcome.seconds:.1f} s")
                    if outcome.job.kind == "cell":
                        store()
                state.check()
        except TimeIsUp:
            say("The time limit is reached. Run the same command to continue.")
        finally:
            outcomes.close()
        say(f"{store()} seeds are complete, and {state.failed} jobs failed. The record is {path}.")
    return Path(path)


def _runs(record: Path, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The seeds in a record whose networks have these numbers of parameters."""
    if not record.exists():
        return []
    stored = json.loads(record.read_text())
    same = [data for data, counts in stored["parameters"].items() if counts == parameters[data]]
    return [run for run in stored["runs"] if run["data"] in same]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the networks and of finished measurements")
    parser.add_argument("--record", type=Path, help="the file of the record, by default benchmarks/results/evidence.json")
    parser.add_argument("--minutes", type=float, help="stop after this time, counted from the start; by default never")
    parser.add_argument("--workers", type=int, default=threads.available_cores(), help="processes, by default one per core")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="the data sets, by default all")
    parser.add_argument("--seeds", type=int, default=8, help="how many seeds are computed on each data set")
    parser.add_argument("--images", type=int, default=IMAGES, help="test images whose maps and scores are measured")
    parser.add_argument("--device", default="auto", help="the device of the measurements; the studies state the device of the trainings")
    parser.add_argument("--toy", action="store_true", help="tiny networks, and a record that docs/evidence.md does not read")
    options = parser.parse_args(arguments)
    options.record = options.record or (options.out / "evidence.json" if options.toy else RESULTS / "evidence.json")
    run(options)


if __name__ == "__main__":
    main()
