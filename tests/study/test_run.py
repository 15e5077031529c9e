"""Whole studies: the numbers of the single commands, and the same files after any interruption."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kdx.commands import explain, study
from kdx.disk import lock_folder
from kdx.distill import distill
from kdx.errors import KdxError
from kdx.runs.plan import Plan
from kdx.runs.record import read_run
from kdx.study.attempts import Outcome
from kdx.study.design import design_of
from kdx.study.grid import Job
from kdx.study.table import CellStatus, measurements_of, read_study
from tests import command_line as commands
from tests.command_line import Run, left_in
from tests.study.small_study import ASSISTANT, CONTENT, STUDENT, TEACHER

DESIGN = {**copy.deepcopy(CONTENT), "methods": ["kd"], "assistants": {"medium": ASSISTANT}}
FILES = ("study.csv", "study.tex")


def run_study(content: dict[str, Any], out: Path, **settings: Any) -> list[str]:
    """The lines that a study announces."""
    lines: list[str] = []
    study.run(design_of(content), out, workers=1, announce=lines.append, **settings)
    return lines


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was not interrupted."""
    out = tmp_path_factory.mktemp("study") / "out"
    run_study(DESIGN, out)
    return out


def contents(out: Path) -> dict[str, Any]:
    """The files of a study, without the command, which the page states as well."""
    stored = json.loads((out / "study.json").read_text())
    del stored["plan"]["command"]
    return {**{name: (out / name).read_bytes() for name in FILES}, "study.json": stored}


@pytest.mark.parametrize(
    "entries", [{"training": {"device": "cuda:77"}}, {"explain": {"device": "cuda:77"}}, {"explain": {"device": "gpu"}}]
)
def test_a_device_that_is_not_here_is_an_error_before_anything_is_trained(entries: dict[str, Any], tmp_path: Path) -> None:
    content = {**DESIGN, **{table: {**DESIGN[table], **values} for table, values in entries.items()}}
    with pytest.raises(KdxError, match=r"The device '(cuda:77|gpu)' can"):
        run_study(content, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]  # so that the corrected study can have this folder


@pytest.mark.parametrize(
    ("training", "problem"),
    [
        ({"teacher_cache": "CACHE", "augment": True}, "cannot be stored, because augmentation changes the images"),
        ({"teacher_cache": "FILE"}, "FILE cannot be written: File exists"),
        ({"log": ["csv", "wandb"]}, "The log wandb needs a package that is not installed"),
        ({"precision": "float16"}, "float16 needs a GPU for training"),
        ({"channels_last": True}, "cannot train the layer layer2.0.downsample.0 with --channels-last"),
    ],
)
def test_what_only_students_need_is_checked_before_a_teacher_is_trained(
    training: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    monkeypatch.setattr("accelerate.utils.imports.is_wandb_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(KdxError, match=problem):
        run_study({**DESIGN, "training": {**DESIGN["training"], "device": "cpu", **training}}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_the_cost_of_a_study_on_a_device_that_is_not_here_is_an_error(tmp_path: Path) -> None:
    design = design_of({**DESIGN, "training": {**DESIGN["training"], "device": "gpu"}})
    with pytest.raises(KdxError, match="The device 'gpu' cannot be used here"):
        study.dry_run(design, tmp_path / "out")


@pytest.mark.slow
def test_the_numbers_are_those_of_the_single_commands(complete: Path, tmp_path: Path) -> None:
    """Of `kdx distill` with and without --assistant, which train their own teacher and base, and of `kdx explain`."""
    result = read_study(complete)
    design = design_of(DESIGN)
    assert len(result.cells) == 2 and set(result.status.values()) == {CellStatus("complete")}
    for cell in result.cells:
        settings, _ = design.training_of("digits", "kd", cell.seed)
        data, out = design.reference_of("digits"), tmp_path / cell.teacher / str(len(cell.assistants))
        chain = [ASSISTANT] if cell.assistants else []
        models = distill(
            data, teacher=TEACHER, student=STUDENT, assistants=chain, out=out / "models", settings=settings, report=lambda _: None
        )
        explain.run(data, models, out / "run", options=design.run_options_of("digits"), announce=lambda line: None)
        expected = list(measurements_of(cell.key, read_run(out / "run").stored_scores))
        assert [number for number in result.measurements if number.cell == cell.key] == expected
        assert (complete / cell.folder / "scores.csv").read_bytes() == (out / "run" / "scores.csv").read_bytes()
        assert (complete / cell.folder / "report.html").is_file()
    assert (complete / "report.html").is_file()
    assert not (complete / "features").exists()  # the shared passes are temporary


@pytest.mark.slow
def test_a_complete_study_computes_nothing_and_a_larger_one_only_what_is_new(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(complete)
    monkeypatch.setattr(study, "perform", None)
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "with_models", None)  # a machine on which no run can be planned, such as one without the file of the groups
        assert run_study(DESIGN, complete) == ["2 cells, 5 jobs, 0 of them to do, with 1 worker."]
    assert contents(complete) == before
    done: list[str] = []

    def perform(job: Any, folder: Path, note: Callable[[str], None]) -> None:
        done.append(job.key)
        raise KdxError("Enough.", "Stop.")

    monkeypatch.setattr(study, "perform", perform)
    with pytest.raises(KdxError, match=r"2 of 4 cells failed; the first error was in digits/seed0/assistant-large\+medium-at: Enough"):
        run_study({**DESIGN, "methods": ["kd", "at"]}, complete)
    assert done == ["digits/seed0/assistant-large+medium-at", "digits/large/tiny/at/seed0"]
    extended = read_study(complete)
    assert [status.state for status in extended.status.values()].count("failed") == 2
    assert len(extended.measurements) == len(contents(complete)["study.csv"].splitlines()) - 1 > 0  # those of the complete cells
    run_study(DESIGN, complete)
    assert contents(complete) == before


@pytest.mark.slow
def test_results_of_other_inputs_are_refused(complete: Path) -> None:
    with pytest.raises(KdxError, match=r"training\.epochs = 1, and this one has 2"):
        run_study({**DESIGN, "training": {**DESIGN["training"], "epochs": 2}}, complete)
    done = next(complete.glob("trainings/*/*/teacher-*/done.json"))
    stored = done.read_text()
    done.write_text(stored.replace(f'"teacher": "{TEACHER}"', '"teacher": "kdx:resnet"'))
    with pytest.raises(KdxError, match=r"computed from other inputs \(it differs in teacher\)"):
        run_study(DESIGN, complete)
    done.write_text(stored)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_study_that_is_killed_and_restarted_gives_the_same_files(complete: Path, tmp_path: Path) -> None:
    """Killed in a training, in an explanation, and when it has written half of its cells."""
    out, file = tmp_path / "out", tmp_path / "study.toml"
    file.write_text(toml_of(DESIGN))
    cell = out / "cells/digits/large/tiny/kd/seed0"
    for file_at_death in (out / "trainings/digits/seed0/teacher-large/teacher.safetensors", cell / "run/manifest.json", cell / "done.json"):
        run_and_kill([str(file), "--out", str(out), "--workers", "1"], file_at_death)
        assert not (out / "study.csv").exists()
    run_study(DESIGN, out)
    assert contents(out) == contents(complete)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["manifest.json", "scores.json", "samples.parquet", "maps.zarr/zarr.json"])
def test_a_damaged_run_is_computed_again_by_the_next_start(complete: Path, damaged: str) -> None:
    """Maps are read for the page alone, after the numbers of all cells."""
    before, page = contents(complete), (complete / "report.html").read_bytes()
    (complete / "cells/digits/large/tiny/kd/seed0/run" / damaged).write_bytes(b"damaged")
    with pytest.raises(KdxError, match="damaged"):
        run_study(DESIGN, complete)
    assert read_study(complete).status["digits/large/tiny/kd/seed0"].state == "missing"
    run_study(DESIGN, complete)
    assert contents(complete) == before and (complete / "report.html").read_bytes() == page


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["trainings/*/*/teacher-*/teacher", "cells/*/large/tiny/kd/seed0/models/base"])
def test_weights_that_were_deleted_are_computed_again(complete: Path, lost: str) -> None:
    """The new weights equal the deleted ones, and no other job runs again."""
    before = contents(complete)
    (path,) = complete.glob(f"{lost}.safetensors")
    content = path.read_bytes()
    path.unlink()
    lines = run_study(DESIGN, complete)
    assert lines[0] == "2 cells, 5 jobs, 1 of them to do, with 1 worker."
    assert path.read_bytes() == content and contents(complete) == before


@pytest.mark.slow
def test_the_disk_has_each_teacher_and_each_base_once(complete: Path) -> None:
    """These are the teachers and bases of two cells, one of which has an assistant, and those of the trainings."""
    files = [*complete.rglob("*.safetensors")]
    by_content: dict[bytes, set[int]] = {}
    for path in files:
        by_content.setdefault(path.read_bytes(), set()).add(path.stat().st_ino)
    assert len(by_content) < len(files) and {len(inodes) for inodes in by_content.values()} == {1}


def toml_of(content: dict[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in content.items() if not isinstance(value, dict)]
    for name, table in content.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines)


def run_and_kill(arguments: list[str], file: Path) -> None:
    """Start `kdx study`, and kill it when this file exists."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "kdx", "study", *arguments], env=environment, stdout=subprocess.DEVNULL)
    try:
        while not file.exists():
            assert process.poll() is None, "the study ended by itself"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


# ---- the command line ----


def test_an_error_ends_the_jobs_before_the_folder_is_unlocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[bool] = []

    def run_jobs(jobs: Sequence[Job], *_: object, **__: object) -> Iterator[Outcome]:
        try:
            yield Outcome(jobs[0], 0.0, "It is ill.", "Help it.")
        finally:
            with pytest.raises(KdxError, match="Another process"):
                lock_folder(tmp_path)
            locked.append(True)

    def announce(line: str) -> None:
        if line.startswith("[1/"):
            raise KdxError("The disk is full.", "Make room.")

    monkeypatch.setattr(study, "run_jobs", run_jobs)
    with pytest.raises(KdxError, match="disk is full"):
        study.run(design_of(CONTENT), tmp_path, workers=1, announce=announce)
    assert locked


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    return commands.in_folder(tmp_path, monkeypatch, capsys)


FLAGS = ("study", "--data", "digits=sample:100:digits", "--teacher", f"large={TEACHER}", "--student", f"tiny={STUDENT}", "--set")


def test_a_dry_run_prints_the_plan_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    status, out, _ = run(*FLAGS, "training.image_size=8", "--method", "kd", "--method", "at", "--seeds", "2", "--epochs", "3", "--dry-run")
    assert status == 0 and left_in(tmp_path) == []
    assert [line.split()[0] for line in out.splitlines() if line.endswith("to do")][-4:] == [
        f"digits/large/tiny/{method}/seed{seed}" for method in ("kd", "at") for seed in (0, 1)
    ]
    rows = [line for line in out.splitlines() if line.rstrip().endswith("s *")]
    assert [row.split()[0] for row in rows] == ["teacher", "base", "student"]
    assert "takes 8 passes" in out and "separate runs would take 12" in out  # 4 students, and per seed a teacher and a base


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        (["study"], "The study has no file and no data.", "Give a study file"),
        (["study", "none.toml"], "The study file none.toml cannot be read", "docs/studies.md"),
        ([*FLAGS, "training.epoch=3", "--method", "kd"], "no option 'training.epoch'", "Did you mean epochs"),
        ([*FLAGS, "training.epochs=3", "--method", "kx"], "no distillation method 'kx'", "Choose one of: kd"),
        (
            [*FLAGS, "training.image_size=8", "--method", "kd", "-l", "layer9"],
            "The network large: The network has no layer 'layer9'",
            "layer2",
        ),
        (
            [*FLAGS, "training.image_size=8", "--method", "kd", "--images", "4"],
            "split of sample:4:sample:100:digits",
            "every split needs",
        ),
        ([*FLAGS, "training.image_size=8", "--method", "kd", "--out", "full"], "full is neither empty nor a study", "new folder"),
    ],
)
def test_bad_input_ends_with_an_error_before_anything_is_written(
    run: Run, tmp_path: Path, arguments: list[str], problem: str, hint: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    status, _, error = run(*arguments)
    assert status == 2 and problem in error and hint in error
    assert left_in(tmp_path) == ["full/file"]
