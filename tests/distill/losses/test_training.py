"""Whole trainings with the losses: they resume bit for bit, work between families, and learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdx.distill import METHODS, Batch, EpochResult, Requirements, TrainingSettings, distill
from kdx.errors import KdxError
from kdx.models import models_file
from tests.distill.small import QUICK, STUDENT, TEACHER, Interruption, stop_at

EVERYTHING = "fitnet:0.01+ofd+crd,negatives=32,width=8:0.1+reviewkd:0.1+catkd:0.01+rkd:0.1+dkd:0.1"
SEEN: list[Tensor] = []
SMALL = "kdx:resnet,width=4,depth=1"
LEARNING = TrainingSettings(epochs=16, teacher_epochs=4, batch=32, image_size=(16, 16), student_images=200, learning_rate=0.05)


def silent(_result: EpochResult) -> None:
    pass


class TokenNetwork(nn.Module):
    """A small vision transformer: patches of 2 x 2, a class token, two blocks, and a head on the mean of the patches."""

    def __init__(self, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(tokens[:, 1:].mean(1))
        return logits


def watched(batch: Batch) -> Tensor:
    """A loss of 0 that records which images it has seen."""
    assert batch.indices is not None
    SEEN.append(batch.indices.clone())
    return 0 * batch.student.logits.sum()


watched.requirements = Requirements(memory=True)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arguments of a training with every loss that has a state, and the folder of one that was not interrupted."""
    arguments: dict[str, Any] = {
        "teacher": f"{TEACHER}@{finished / 'teacher.safetensors'}",
        "student": STUDENT,
        "base": finished / "base.safetensors",
        "settings": replace(QUICK, method=EVERYTHING),
    }
    out = tmp_path_factory.mktemp("methods") / "whole"
    distill("digits", out=out, report=silent, **arguments)
    return {"out": out, **arguments}


@pytest.mark.slow
def test_adapters_and_banks_resume_bit_for_bit(whole: dict[str, Any], tmp_path: Path) -> None:
    arguments = whole | {"out": tmp_path}
    for epoch in (1, 2):
        with pytest.raises(Interruption):
            distill("digits", report=stop_at("student", epoch), **arguments)
        assert torch.load(tmp_path / "student.state.pt", weights_only=True)["epoch"] == epoch
    distill("digits", report=silent, **arguments)
    assert (tmp_path / "student.safetensors").read_bytes() == (whole["out"] / "student.safetensors").read_bytes()
    with pytest.raises(KdxError, match="another configuration: method differs"):
        distill("digits", report=silent, **arguments | {"settings": replace(QUICK, method="fitnet")})


def test_adapters_are_discarded(whole: dict[str, Any], finished: Path) -> None:
    """The student has the parameters of its architecture and nothing else."""
    from safetensors.torch import load_file

    assert load_file(whole["out"] / "student.safetensors").keys() == load_file(finished / "student.safetensors").keys()
    assert models_file.read_models(whole["out"] / "models.toml").training["method"] == EVERYTHING


@pytest.mark.parametrize("student_is_transformer", [pytest.param(False, marks=pytest.mark.slow), True])
def test_teacher_and_student_may_be_of_different_families(tmp_path: Path, student_is_transformer: bool) -> None:
    transformer = f"{__name__}:TokenNetwork,width=6"
    teacher, student = (TEACHER, transformer) if student_is_transformer else (transformer, STUDENT)
    settings = replace(QUICK, method=EVERYTHING + "+at:0.01", epochs=1, teacher_epochs=1, learning_rate=0.01)
    path = distill("digits", teacher=teacher, student=student, out=tmp_path, settings=settings, report=silent)
    pair = ("blocks.1=layer2",) if student_is_transformer else ("layer2=blocks.1",)
    assert models_file.read_models(path).layers == pair


def test_indices_are_the_positions_of_the_training_images(finished: Path, tmp_path: Path) -> None:
    SEEN.clear()
    teacher, base = f"{TEACHER}@{finished / 'teacher.safetensors'}", finished / "base.safetensors"
    settings = replace(QUICK, method=f"kd+{__name__}:watched")
    distill("digits", teacher=teacher, student=STUDENT, out=tmp_path, settings=settings, base=base, report=silent)
    assert sorted(torch.cat(SEEN[1:]).tolist()) == sorted(3 * list(range(100)))  # every image once per epoch, after the rehearsal
    student = (finished / "student.safetensors").read_bytes()
    from safetensors.torch import load

    ours, kd = load((tmp_path / "student.safetensors").read_bytes()), load(student)
    assert all(torch.equal(ours[name], kd[name]) for name in kd)  # the loss of 0 changed nothing


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a base that were trained once for all methods."""
    out = tmp_path_factory.mktemp("methods") / "shared"
    distill("digits", teacher="kdx:resnet,width=8,depth=1", student=SMALL, out=out, settings=LEARNING, report=silent)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns(method: str, shared: Path, tmp_path: Path) -> None:
    """Three times as many correct predictions as by chance, at least."""
    teacher, settings = f"kdx:resnet,width=8,depth=1@{shared / 'teacher.safetensors'}", replace(LEARNING, method=method)
    path = distill(
        "digits", teacher=teacher, student=SMALL, base=shared / "base.safetensors", out=tmp_path, settings=settings, report=silent
    )
    assert models_file.read_models(path).training["student_accuracy"] > 0.3
