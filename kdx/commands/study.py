"""`kdx study`: trains and explains the cells of a grid, and writes its table, its LaTeX table and its page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from kdx import models, progress, threads
from kdx.choices import NO_BASE
from kdx.cluster.options import ClusterOptions
from kdx.commands import explain
from kdx.disk import check_folder, check_locked, lock_folder, parse_json, remove_leftovers, write_atomic
from kdx.distill import EpochResult, distill, train_alone
from kdx.errors import KdxError, resumable
from kdx.runs import schema
from kdx.runs.environment import environment
from kdx.runs.record import LostResult, read_run
from kdx.study.attempts import Note, Outcome
from kdx.study.checks import check_machine, check_runs
from kdx.study.conflicts import check_same_study
from kdx.study.cost import Cost, costs
from kdx.study.design import Design
from kdx.study.grid import MODELS, RUN, Grid, Job, grid_of
from kdx.study.latex import latex_table
from kdx.study.page import write_page
from kdx.study.schedule import run_jobs
from kdx.study.statistics import study_statistics
from kdx.study.table import LATEX_FILE, STUDY_FILE, Cell, CellStatus, Measurement, measurements_of, read_study, write_plan, write_table
from kdx.study.weights import SharedWeights, weights_files

DONE = "done.json"
"""The file of a complete job, in its folder: the job's identity, and the seconds that it took."""

NETWORKS = "networks"
"""The folder of exported networks, which the runs of a study share."""

FEATURES = "features"
"""The folder of the outputs of networks that several cells share, while these cells are explained."""

SMALL = 2_000_000
"""Parameters up to which a network leaves cores idle, so that by default a study uses a process per core."""

Announce = Callable[[str], None]


def perform(job: Job, folder: Path, note: Note) -> None:
    """Do a job of a study. What a stopped attempt has done is used."""
    models_file = train(job, folder, note)
    if models_file is None:
        return
    run = folder / job.folder / RUN
    command = ["kdx", "explain", job.data, "--models", str(models_file), "--out", str(run)]
    with progress.redirected(lambda task, done, total, _note: note(f"{task}, {done:.0f} of {total}")):
        explain.run(
            job.data,
            models_file,
            run,
            options=job.options,
            networks=folder / NETWORKS,
            shared_features=folder / _features(job),
            command=command,
            announce=lambda line: note(line) if line.startswith("Warning: ") else None,
        )


def train(job: Job, folder: Path, note: Note) -> Path | None:
    """Train the network of a job. The path of a cell's models file; None for a job that trains a network that cells share."""
    teacher = job.teacher
    if job.teacher_weights is not None:
        weights = str((folder / job.teacher_weights).absolute())
        teacher = str(models.parse_reference(teacher).with_weights(weights))
    out = folder / job.folder
    shared: dict[str, Any] = {
        "settings": job.settings,
        "log": job.extras.log,
        "device": job.extras.device,
        "report": partial(_report, note),
    }
    if job.kind in ("teacher", "base"):
        train_alone("teacher" if job.kind == "teacher" else "base", job.data, teacher=teacher, student=job.student, out=out, **shared)
        return None
    shared["teacher_cache"] = job.extras.teacher_cache
    if job.kind == "assistant":
        distill(job.data, teacher=teacher, student=job.student, out=out, base=NO_BASE, **shared)
        return None
    return distill(
        job.data,
        teacher=teacher,
        student=job.student,
        out=out / MODELS,
        base=job.base if job.base in (None, NO_BASE) else (folder / str(job.base)).absolute(),
        layers=job.layers or None,
        probe=job.extras.probe,
        **shared,
    )


def _features(job: Job) -> Path:
    """The folder for the outputs of the teachers and bases that the cells of a data set and a seed share, relative to the study's."""
    return Path(FEATURES, job.key.split("/")[0], f"seed{job.settings.seed}")


def _report(note: Note, result: EpochResult) -> None:
    note(f"{result.network}, epoch {result.epoch} of {result.epochs}")


@dataclass
class _Run:
    """A study in progress: what is complete, and how the cells that are not have ended."""

    folder: Path
    grid: Grid
    plan: Mapping[str, Any]
    complete: set[str]
    problems: dict[str, Outcome] = field(default_factory=dict)
    weights: SharedWeights = field(default_factory=SharedWeights)

    def __post_init__(self) -> None:
        for job in self.grid.jobs:
            if job.key in self.complete:
                self._share_weights(job)

    def _share_weights(self, job: Job) -> None:
        self.weights.add(self.folder / path for path in weights_files(job))

    def status(self) -> dict[str, CellStatus]:
        """The state of every cell."""
        status = {}
        for cell in self.grid.cells:
            if cell.key in self.complete:
                status[cell.key] = CellStatus("complete")
            elif cell.key in self.problems:
                status[cell.key] = CellStatus("failed", self.problems[cell.key].problem)
        return status

    def write_plan(self) -> None:
        write_plan(self.folder, self.plan, self.grid.cells, self.status())

    def end(self, outcome: Outcome) -> None:
        """Record how a job has ended."""
        job = outcome.job
        if outcome.problem:
            self.problems[job.key] = outcome
        else:
            self._share_weights(job)
            write_done(self.folder, outcome)
            self.complete.add(job.key)
        if job.kind == "cell":
            self.write_plan()
            features = _features(job)
            others = (other for other in self.grid.jobs if other.kind == "cell" and _features(other) == features)
            if all(other.key in self.complete or other.key in self.problems for other in others):
                shutil.rmtree(self.folder / features, ignore_errors=True)


def run(
    design: Design,
    folder: Path,
    *,
    workers: int | None = None,
    cluster: ClusterOptions | None = None,
    command: Sequence[str] = (),
    announce: Announce = print,
) -> Path:
    """Train and explain what is missing of a study in ``folder``, and write study.json, study.csv, study.tex and the page, report.html.

    workers: processes, by default one per core where all networks are small and no GPU is used, otherwise 1. Their number does not change
    the results, because the number of threads of each is recorded when the study starts. cluster: jobs run in workers of Ray instead.
    Returns the path of the page.

    Raises KdxError for a folder with another study or other files, for ``workers`` of a cluster, and, at the end, if a cell has failed.
    Ctrl-C raises `Stopped`.
    """
    if workers is not None and cluster is not None:
        raise KdxError("A study in a cluster has as many workers as the cluster has room for.", "Leave --workers or --cluster out.")
    _checked(folder)
    grid = grid_of(design)
    with lock_folder(folder) as lock, resumable(lambda: any(folder.rglob("*.safetensors")) or any(folder.rglob("*.state.pt"))):
        remove_leftovers(folder)
        count = workers or _default_workers(grid)
        plan = _plan(design, grid, folder, command, _threads(count, cluster))
        study = _Run(folder, grid, plan, set(complete_jobs(folder, grid.jobs)))
        incomplete = [job for job in grid.jobs if job.key not in study.complete]
        check_runs(incomplete)
        if cluster is None:  # the workers of a cluster may have other devices
            check_machine(incomplete)
        study.write_plan()
        todo = len(incomplete)
        where = "in a cluster" if cluster is not None else f"with {count} worker{'s' if count > 1 else ''}"
        announce(f"{len(grid.cells)} cells, {len(grid.jobs)} jobs, {todo} of them to do, {where}.")
        with progress.job_display(todo) as display:

            def on_note(job: Job, note: str) -> None:
                if note.startswith("Warning: "):
                    announce(f"Warning: {job.key}: {note.removeprefix('Warning: ')}")
                else:
                    display.note(job.key, note)

            done = frozenset(study.complete)
            outcomes = run_jobs(
                grid.jobs, perform, folder, workers=count, threads=plan["threads"], cluster=cluster, on_note=on_note, complete=done
            )
            with closing(outcomes):  # no process works in the folder when its lock ends, also after an error
                for ended, outcome in enumerate(outcomes, 1):
                    study.end(outcome)
                    display.end(outcome.job.key)
                    announce(f"[{ended}/{todo}] {outcome.job.kind} {outcome.job.key}: {_ending(outcome)}")
        check_locked(folder, lock)
        return _finish(study)


def dry_run(design: Design, folder: Path, *, workers: int | None = None) -> Group:
    """The plan of a study with its cost, to be printed. Nothing is trained, and nothing is written."""
    grid = grid_of(design)
    if (folder / STUDY_FILE).exists():
        check_same_study(folder, read_study(folder).plan, _entries(design, grid))
    complete = complete_jobs(_checked(folder), grid.jobs)
    check_runs([job for job in grid.jobs if job.key not in complete])
    count = workers or _default_workers(grid)
    cells = Table("cell", "state", box=None, pad_edge=False)
    for cell in grid.cells:
        cells.add_row(escape(cell.key), "complete" if cell.key in complete else "to do")
    return Group(cells, "", _cost_table(costs(grid, complete), count), *_passes(grid))


def _cost_table(rows: Sequence[Cost], workers: int) -> Group:
    left = sum(row.left for row in rows)
    is_timed = any(row.source == "batch" and row.jobs > row.done for row in rows)
    table = Table("work", "networks", "jobs", "to do", "epochs", "time of one", box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    for row in rows:
        kind = "student" if row.kind == "cell" else row.kind
        counts = (str(number) for number in (row.jobs, row.jobs - row.done, row.epochs))
        table.add_row(kind, escape(" > ".join(row.networks)), *counts, _duration(row.seconds) + (" *" if row.source == "batch" else ""))
    total = f"{'At least' if is_timed else 'About'} {_duration(left / workers)} with {workers} worker{'s' if workers > 1 else ''}"
    note = "* Estimated from one batch of training, without reading images, maps, scores and pages, which take most of the time of"
    notes = [f"{note} small networks."] if any(row.source == "batch" for row in rows) else []
    return Group(table, "", f"{total}, for {_duration(left)} of work.", *notes)


def _passes(grid: Grid) -> list[str]:
    """Lines about the passes of images through networks that explaining takes."""
    cells = [job for job in grid.jobs if job.kind == "cell"]
    shared = {(job.data, job.settings.seed, network) for job in cells for network in (job.teacher_weights or job.teacher, job.base or "")}
    passes = len(cells) + sum(network not in ("", NO_BASE) for *_, network in shared)
    separate = sum(2 + (job.base not in (None, NO_BASE)) for job in cells)
    return [
        f"Explaining {len(cells)} cell{'s' if len(cells) > 1 else ''} takes {passes} passes of a network over the explained images; "
        f"separate runs would take {separate}.",
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _ending(outcome: Outcome) -> str:
    return f"failed. {outcome.problem} {outcome.hint}" if outcome.problem else f"{outcome.seconds:.1f} s"


def _checked(folder: Path) -> Path:
    """The folder, which is new, empty, or a study's; otherwise KdxError."""
    if not (folder / STUDY_FILE).exists():
        check_folder(folder, "a study", lambda path: path.name.startswith(f".{STUDY_FILE}."))
    return folder


def _default_workers(grid: Grid) -> int:
    largest = max(count for group in grid.parameters.values() for count in group.values())
    uses_gpu = torch.cuda.is_available() and any(job.extras.device != "cpu" for job in grid.jobs)
    return 1 if uses_gpu or largest > SMALL else threads.available_cores()


def _threads(workers: int, cluster: ClusterOptions | None) -> int:
    """The threads of each worker of a new study."""
    if cluster is not None:
        return cluster.cpus_per_worker or threads.chosen() or 1
    return max(1, torch.get_num_threads() // workers)


def _plan(design: Design, grid: Grid, folder: Path, command: Sequence[str], threads: int) -> dict[str, Any]:
    """The plan of study.json: that of the study in the folder, if there is one with the same design, otherwise a new one. threads: those of
    a worker in a new study.

    Raises KdxError if the study in the folder cannot be extended to this one.
    """
    entries = _entries(design, grid)
    known: dict[str, Any] = {}
    if (folder / STUDY_FILE).exists():
        known = dict(read_study(folder).plan)
        check_same_study(folder, known, entries)
        if all(known.get(key) == value for key, value in entries.items()):
            return known
    count = known.get("threads") or threads
    return {**entries, "kdx": version("kdx"), "environment": environment(), "command": list(command), "threads": count}


def _entries(design: Design, grid: Grid) -> dict[str, Any]:
    """The entries of a plan on which the results depend."""
    return {"design": design.as_table(), "fingerprints": dict(grid.fingerprints), "parameters": {**grid.parameters}}


def write_done(folder: Path, outcome: Outcome) -> None:
    """Record in the folder of a job that it is complete."""
    content = {"identity": outcome.job.identity, "seconds": round(outcome.seconds, 3)}
    write_atomic(folder / outcome.job.folder / DONE, (json.dumps(content, indent=1) + "\n").encode())


def files_of_run(job: Job) -> Iterator[Path]:
    """The files of a complete cell besides its weights, relative to the study's folder."""
    if job.kind == "cell":
        yield Path(job.folder, MODELS, "models.toml")
        yield from (Path(job.folder, RUN, name) for name in (schema.MANIFEST, schema.SCORES_FILE, schema.PAGE))


def complete_jobs(folder: Path, jobs: Iterable[Job], results: Callable[[Job], Iterable[Path]] = files_of_run) -> dict[str, float]:
    """The jobs whose results are in the folder, by key, with the seconds that each took. A job is not complete if one of its files is
    missing.

    results: the files of a job besides its weights, relative to the folder. Raises KdxError for results of other inputs, such as data that
    have changed.
    """
    complete = {}
    for job in jobs:
        try:
            stored = parse_json((folder / job.folder / DONE).read_text("utf-8"))
            identity, seconds = dict(stored["identity"]), float(stored["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        different = sorted(key for key in {*identity, *job.identity} if identity.get(key) != job.identity.get(key))
        if different:
            raise KdxError(
                f"{folder / job.folder} was computed from other inputs (it differs in {', '.join(different)}).",
                "Choose another --out, or delete that folder to compute it again.",
            )
        if all((folder / path).is_file() for path in (*weights_files(job), *results(job))):
            complete[job.key] = seconds
    return complete


@contextmanager
def _recomputed_if_damaged(study: _Run, cells: Sequence[Cell], problem: str) -> Iterator[None]:
    """If the block finds a damaged run, let the next start of the study look at these cells again; what is whole is not computed again."""
    try:
        yield
    except LostResult as error:
        for cell in cells:
            study.complete.discard(cell.key)
            with suppress(OSError):
                (study.folder / cell.folder).parent.joinpath(DONE).unlink()
        study.write_plan()
        raise KdxError(f"{problem}: {error.problem}", "Run the same command again; it computes what is damaged again.") from error


def _finish(study: _Run) -> Path:
    """Write the tables and the page of the complete cells. Raises KdxError if a cell has failed."""
    measurements: list[Measurement] = []
    for cell in study.grid.cells:
        if cell.key in study.complete:
            with _recomputed_if_damaged(study, [cell], f"The cell {cell.key} is damaged"):
                measurements += measurements_of(cell.key, read_run(study.folder / cell.folder).stored_scores)
    study.write_plan()
    write_table(study.folder, study.grid.cells, measurements)
    stored = read_study(study.folder)
    confidence = study.grid.jobs[-1].options.confidence
    write_atomic(study.folder / LATEX_FILE, latex_table(stored, study_statistics(stored, {}, confidence)).encode())
    shutil.rmtree(study.folder / FEATURES, ignore_errors=True)
    with _recomputed_if_damaged(study, study.grid.cells, "A cell is damaged"):  # also its maps and pictures are read
        page = write_page(study.folder) if measurements else study.folder / STUDY_FILE
    failed = [outcome for key, outcome in study.problems.items() if any(cell.key == key for cell in study.grid.cells)]
    if failed:
        first = next((outcome for outcome in study.problems.values()), failed[0])
        raise KdxError(
            f"{len(failed)} of {len(study.grid.cells)} cells failed; the first error was in {first.job.key}: {first.problem}",
            f"{first.hint} Then run the same command again; complete cells are kept.",
        )
    return page
