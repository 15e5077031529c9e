"""Training: what base and student share, resuming, and what a run writes."""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdx.distill import EpochResult, TrainingSettings, distill
from kdx.distill import data as distill_data
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph
from kdx.models import models_file
from tests.distill.small import QUICK, STUDENT, TEACHER, Interruption, stop_at, summaries


def test_a_run_writes_weights_and_a_models_file(finished: Path) -> None:
    files = {"teacher.safetensors", "base.safetensors", "student.safetensors", "models.toml"}
    assert {path.name for path in finished.iterdir()} == files | {".lock"}
    file = models_file.read_models(finished / "models.toml")
    assert (file.layers, file.classes, file.data, file.split_seed) == (("layer1", "layer2"), tuple("0123456789"), "digits", 0)
    assert file.training["method"] == "kd" and file.training["test_images"] == 450
    for role in ("teacher", "base", "student"):
        network = file.load(role)
        assert network.preprocessing.size == (8, 8)
        saved = load_file(finished / f"{role}.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in network.module.state_dict().items())


def test_recorded_accuracies_are_measured_on_the_test_split(finished: Path) -> None:
    from kdx.data.dataset import open_data
    from kdx.data.images import load_images
    from kdx.data.splits import stratified_splits

    file = models_file.read_models(finished / "models.toml")
    digits = open_data("digits")
    test = stratified_splits(digits, 0)["test"]
    network = file.load("teacher")
    with torch.no_grad():
        logits = FeatureGraph(network.module, [], network.preprocessing)(load_images(digits, test, (8, 8)).pixels)[0]
    assert file.training["teacher_accuracy"] == pytest.approx(float(np.mean(logits.argmax(1).numpy() == digits.labels[test])), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "epoch"), [("teacher", 1), ("student", 1), ("student", 3)])
def test_an_interrupted_run_ends_with_the_same_weights(finished: Path, tmp_path: Path, network: str, epoch: int) -> None:
    with pytest.raises(Interruption):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=QUICK, report=stop_at(network, epoch))
    assert (tmp_path / f"{network}.state.pt").is_file() and not (tmp_path / "models.toml").exists()
    results: list[EpochResult] = []
    distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=QUICK, report=results.append)
    assert (network, epoch, True) not in summaries(results)
    assert not list(tmp_path.glob("*.state.pt"))
    for name in ("teacher", "base", "student"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (finished / f"{name}.safetensors").read_bytes()
    assert (tmp_path / "models.toml").read_text() == (finished / "models.toml").read_text()


def test_a_finished_run_is_kept(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}
    results: list[EpochResult] = []
    distill("digits", teacher=TEACHER, student=STUDENT, out=finished, settings=QUICK, report=results.append)
    assert summaries(results) == [("teacher", 2, False), ("base", 3, False), ("student", 3, False)]
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}


def test_alpha_zero_is_the_base(finished: Path, tmp_path: Path) -> None:
    """Base and student start alike and see the same batches, so without the teacher's part of the loss they end alike."""
    settings = replace(QUICK, alpha=0.0)
    teacher = f"{TEACHER}@{finished / 'teacher.safetensors'}"
    distill("digits", teacher=teacher, student=STUDENT, out=tmp_path, settings=settings, report=lambda result: None)
    base, student = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", "student"))
    assert all(torch.equal(base[name], student[name]) for name in base)
    trained = load_file(finished / "student.safetensors")
    assert not all(torch.equal(base[name], trained[name]) for name in base)


def test_students_share_teacher_and_base(finished: Path, tmp_path: Path) -> None:
    teacher = f"{TEACHER}@{finished / 'teacher.safetensors'}"
    results: list[EpochResult] = []
    settings = replace(QUICK, method="at")
    shared = finished / "base.safetensors"
    path = distill(
        "digits",
        teacher=teacher,
        student=STUDENT,
        out=tmp_path,
        settings=settings,
        layers=["layer2", "layer1=layer1"],
        base=shared,
        report=results.append,
    )
    assert summaries(results) == [("teacher", 1, False), ("base", 3, False), *(("student", epoch, True) for epoch in (1, 2, 3))]
    for name in ("teacher", "base"):
        ours, theirs = load_file(tmp_path / f"{name}.safetensors"), load_file(finished / f"{name}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    file = models_file.read_models(path)
    assert file.layers == ("layer2", "layer1")
    assert file.teacher == f"{TEACHER},classes=10@teacher.safetensors"  # relative, so the folder can be moved
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    assert models_file.read_models(moved / "models.toml").load("teacher").parameters == file.load("teacher").parameters
    with pytest.raises(KdxError, match="another configuration: seed differs"):
        distill("digits", teacher=teacher, student=STUDENT, out=tmp_path / "other", settings=replace(settings, seed=1), base=shared)
    with pytest.raises(KdxError, match="no base checkpoint"):
        distill("digits", teacher=teacher, student=STUDENT, out=tmp_path / "other", settings=settings, base=tmp_path / "none.safetensors")


def test_without_a_base_the_student_is_the_same(finished: Path, tmp_path: Path) -> None:
    """The base takes no part in the training of the student."""
    results: list[EpochResult] = []
    out = tmp_path / "run"
    distill(
        "digits", teacher=f"{TEACHER}@{finished / 'teacher.safetensors'}", student=STUDENT, out=out, settings=QUICK, base="none",
        report=results.append,
    )  # fmt: skip
    assert {result.network for result in results} == {"teacher", "student"} and not (out / "base.safetensors").exists()
    ours, theirs = (load_file(folder / "student.safetensors") for folder in (out, finished))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    models = models_file.read_models(out / "models.toml")
    assert models.base is None and models.teacher and "base_accuracy" not in models.training


def test_training_learns_and_seeds_matter(finished: Path, tmp_path: Path) -> None:
    settings = TrainingSettings(epochs=4, optimizer="adamw", learning_rate=0.01, image_size=(8, 8), student_images=20)
    losses: list[float] = []

    def keep_loss(result: EpochResult) -> None:
        if result.network == "teacher" and result.loss is not None:
            losses.append(result.loss)

    path = distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=settings, report=keep_loss)
    assert losses[-1] < 0.8 * losses[0]
    assert models_file.read_models(path).training["teacher_accuracy"] > 0.4
    other = distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path / "b", settings=replace(settings, seed=1), report=keep_loss)
    assert models_file.read_models(path).load("student").weights_hash != models_file.read_models(other).load("student").weights_hash


@pytest.mark.slow
def test_without_a_terminal_progress_is_one_line_per_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = replace(QUICK, epochs=1, teacher_epochs=1, student_images=20)
    for _ in range(2):
        distill("digits", teacher=STUDENT, student=STUDENT, out=tmp_path, settings=settings)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("teacher 1/1 epochs, loss ") and lines[5] == "student 1/1 already there"


def test_images_that_cannot_be_read_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(20):
            pixels = generator.integers(0, 100, (9, 9, 3)) + (150 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{index}.png")
    (tmp_path / "data" / "dark" / "3.png").write_bytes(b"not an image")
    settings = replace(QUICK, epochs=1, student_images=None, batch=8)
    path = distill(str(tmp_path / "data"), teacher=TEACHER, student=STUDENT, out=tmp_path / "a", settings=settings)
    assert tomllib.loads(path.read_text())["training"]["unreadable_images"] == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("1 image is left out because unreadable, first dark/3.png: UnidentifiedImageError")
    monkeypatch.setattr(distill_data, "CACHE_BYTES", 0)  # decoded again in every epoch
    path = distill(
        str(tmp_path / "data"), teacher=TEACHER, student=STUDENT, out=tmp_path / "b", settings=settings, report=lambda result: None
    )
    assert tomllib.loads(path.read_text())["training"]["unreadable_images"] == 1
    assert (tmp_path / "b" / "student.safetensors").is_file()
    capsys.readouterr()
    distill(str(tmp_path / "data"), teacher=TEACHER, student=STUDENT, out=tmp_path / "c", settings=settings)
    assert "dark/3.png" in capsys.readouterr().out.splitlines()[-1]  # discovered during training
    for index in (4, 5, 7, 8):
        (tmp_path / "data" / "dark" / f"{index}.png").write_bytes(b"")
    for cached, name in ((0, "d"), (10**9, "e")):
        monkeypatch.setattr(distill_data, "CACHE_BYTES", cached)
        with pytest.raises(KdxError, match=r"of \d+ images cannot be read.*\n.*--max-unreadable"):
            distill(str(tmp_path / "data"), teacher=TEACHER, student=STUDENT, out=tmp_path / name, settings=settings)
    with pytest.raises(KdxError, match="max_unreadable"):
        replace(settings, max_unreadable=1.5)
