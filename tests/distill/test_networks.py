"""Networks that cannot be trained or cannot teach, and teachers that come with their weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdx import models
from kdx.distill import EpochResult, distill
from kdx.errors import KdxError
from kdx.models import models_file
from tests.distill.small import QUICK, STUDENT, TEACHER, summaries


def test_inputs_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    quick = replace(QUICK, epochs=1, teacher_epochs=1, student_images=20)
    with pytest.raises(KdxError, match="diverged"):
        distill(
            "digits",
            teacher=TEACHER,
            student=STUDENT,
            out=tmp_path / "a",
            settings=replace(quick, learning_rate=1e30),
            report=lambda result: None,
        )
    with pytest.raises(KdxError, match="no layer 'layer9'"):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path / "b", settings=quick, layers=["layer2=layer9"])
    with pytest.raises(KdxError, match="The device 'cuda:77' cannot be used"):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path / "c", settings=quick, device="cuda:77")
    with pytest.raises(KdxError, match="The teacher has 4 classes, and the data has 10"):
        distill("digits", teacher=f"{TEACHER},classes=4", student=STUDENT, out=tmp_path / "d", settings=quick)
    with pytest.raises(KdxError, match="cannot be trained"):
        distill("digits", teacher=TEACHER, student="net.pt2", out=tmp_path / "e", settings=quick)
    with pytest.raises(KdxError, match="A batch of 20 of the 20 training images cannot be split into 16 parts"):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path / "e", settings=replace(quick, batch=64, accumulate=16))
    with pytest.raises(KdxError, match="does not state the size"):
        distill("digits", teacher="torch.nn:Identity", student=STUDENT, out=tmp_path / "e", settings=replace(quick, image_size=None))


@pytest.mark.parametrize(
    ("classes", "weight", "message"),
    [
        (12, None, "The teacher has 12 classes and the student 10"),
        (4, None, "The teacher has 4 classes, and the data has 10"),
        (10, float("nan"), "The weights of the teacher are not finite numbers: fc.weight"),
        (10, float("inf"), "The weights of the teacher are not finite numbers: fc.weight"),
        (10, 3e38, "The teacher's logits are not finite numbers"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_trained(
    tmp_path: Path, classes: int, weight: float | None, message: str
) -> None:
    network = models.load(f"{TEACHER},classes={classes}").module
    if weight is not None:
        nn.init.constant_(network.get_parameter("fc.weight"), weight)
    save_file(network.state_dict(), tmp_path / "t.safetensors")
    results: list[EpochResult] = []
    with pytest.raises(KdxError, match=message):
        distill(
            "digits",
            teacher=f"{TEACHER},classes={classes}@{tmp_path / 't.safetensors'}",
            student=STUDENT,
            out=tmp_path / "run",
            settings=QUICK,
            report=results.append,
        )
    assert not results and [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def save_program(teacher: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("n", min=1)},)
        torch.export.save(torch.export.export(teacher, (torch.rand(2, 3, 8, 8),), dynamic_shapes=shapes), path)
    return str(path)


def save_folder(teacher: Any, path: Path) -> str:
    teacher.save_pretrained(path)
    return f"hf:{path}"


@pytest.mark.parametrize("kind", [pytest.param("program", marks=pytest.mark.slow), "folder"])
def test_a_teacher_with_its_own_weights_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "program":
        teacher = models.load(TEACHER, classes=10).module
        reference = save_program(teacher, tmp_path / "teacher.pt2")
    else:
        pytest.importorskip("torchvision")
        transformers = pytest.importorskip("transformers")
        config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10)
        teacher = transformers.ResNetForImageClassification(config)
        reference = save_folder(teacher, tmp_path / "teacher")
    results: list[EpochResult] = []
    monkeypatch.chdir(tmp_path)
    settings = replace(QUICK, epochs=1)
    relative = reference.replace(f"{tmp_path}/", "./")
    path = distill("digits", teacher=relative, student=STUDENT, out="run", settings=settings, report=results.append)
    assert summaries(results) == [("teacher", 1, False), ("base", 1, True), ("student", 1, True)]
    monkeypatch.chdir("/")
    file = models_file.read_models(tmp_path / path)
    assert file.load("teacher").weights_hash == models.weights_hash(teacher)
    assert file.load("teacher").trained and file.load("student").trained
