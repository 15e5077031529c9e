"""Damaged runs, and runs with hostile names."""

from __future__ import annotations

import csv
import functools
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kdx.distill import EpochResult, distill
from kdx.report.page import write_page
from kdx.runs.opened import open_run
from kdx.runs.run import RunOptions, explain_dataset
from tests.distill.small import QUICK, STUDENT, TEACHER, Interruption, stop_at
from tests.hostile.cases import write_inputs
from tests.hostile.input_files import Call, Target, fresh
from tests.hostile.mutations import HOSTILE_TEXTS, damaged, damaged_json


@functools.cache
def finished() -> Path:
    """A finished run, which is not changed."""
    folder = Path(tempfile.mkdtemp())
    write_inputs(folder)
    options = RunOptions(batch=8, geometry="batch", permutations=5, runtime="eager", gallery=1)
    explain_dataset(str(folder / "pictures"), folder / "models.toml", folder / "run", (), options, announce=lambda _: None)
    return folder / "run"


def of_run(name: str, change: Callable[[bytes, random.Random], bytes], *, page: bool) -> Target:
    """A run with a damaged file. Its numbers, maps and pictures are read, or its page is written."""

    def target(path: Path, random_: random.Random) -> Call:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(finished(), path)
        file = random_.choice(sorted(path.glob(name)))
        file.write_bytes(change(file.read_bytes(), random_))

        def read() -> None:
            if page:
                write_page(path)
            run = open_run(path)
            _ = run.scores, run.class_scores, run.table(), run.table("images")
            image = run[0]
            _ = image.pixels, dict(image.numbers)
            for layer in image.layers.values():
                _ = dict(layer.maps), dict(layer.score_maps), dict(layer.numbers)

        return read

    return target


def names(path: Path, random_: random.Random) -> Call:
    """A page of a run whose classes, images and layers have hostile names: none of them may become markup, not even in the tables."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(finished(), path)
    hostile = [text for text in HOSTILE_TEXTS if "\ud800" not in text]
    classes = [random_.choice(hostile) + "1", random_.choice(hostile) + "2"]
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["classes"] = classes
    manifest["command"] = ["kdx", random_.choice(hostile)]
    manifest["environment"]["runtime"] = random_.choice(hostile)
    (path / "manifest.json").write_text(json.dumps(manifest))

    def read() -> None:
        page = write_page(path).read_text("utf-8")
        for text in ("<script>alert", "<img src=x", "<svg onload", "\x1b", "\u202e", "\x9b"):
            if text in page:
                raise ValueError(f"{text!r} is in the page")
        run = open_run(path)
        for cell in _cells(run.class_scores.to_csv() if hasattr(run.class_scores, "to_csv") else ""):
            if cell.startswith(("=", "@", "+1", "\t")):
                raise ValueError(f"a formula in a table: {cell[:50]!r}")

    return read


def _cells(text: str) -> Iterator[str]:
    for row in csv.reader(io.StringIO(text)):
        yield from row


@functools.cache
def stopped() -> Path:
    """A distillation that was stopped after the first of two epochs of the student. It is not changed."""
    folder = Path(tempfile.mkdtemp()) / "distillation"
    with suppress(Interruption):
        _distil(folder, stop_at("student", 1))
    assert (folder / "student.state.pt").exists() and (folder / "base.safetensors").exists()
    return folder


def _distil(folder: Path, report: Callable[[EpochResult], None]) -> None:
    settings = replace(QUICK, teacher_epochs=1, epochs=2, student_images=50)
    distill("sample:200:digits", teacher=TEACHER, student=STUDENT, out=folder, settings=settings, device="cpu", report=report)


def distillation(path: Path, random_: random.Random) -> Call:
    """An unfinished distillation with a damaged file, which the same command continues."""
    folder = fresh(path) / "distillation"
    shutil.copytree(stopped(), folder)
    file = random_.choice([file for file in sorted(folder.rglob("*")) if file.is_file()])
    file.write_bytes((damaged_json if file.suffix == ".json" else damaged)(file.read_bytes(), random_))
    return lambda: _distil(folder, lambda result: None)
