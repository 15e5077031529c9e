"""Mistakes in the student's loss show before any network is trained."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdx.distill import Batch, EpochResult, Requirements, distill
from kdx.errors import KdxError
from tests.distill.small import QUICK, STUDENT, TEACHER, GradientTimes


def failing(batch: Batch) -> Tensor:
    return batch.student.features[7].mean()


def not_a_number(batch: Batch) -> Tensor:
    return (batch.student.logits - batch.student.logits).log().mean() * 0


def constant(_batch: Batch) -> Tensor:
    return torch.tensor(1.0)


def of_the_teacher(batch: Batch) -> Tensor:
    return batch.teacher.logits.square().mean()


def with_wrong_gradient(batch: Batch) -> Tensor:
    wrong: Tensor = GradientTimes.apply(batch.student.logits, math.nan)  # type: ignore[no-untyped-call]
    return wrong.square().mean()


OWN: tuple[Any, ...] = (failing, not_a_number, constant, of_the_teacher, with_wrong_gradient)
for _loss in OWN:
    _loss.requirements = Requirements(logits=True)


def nothing_is_trained(result: EpochResult) -> None:
    raise AssertionError(f"{result.network} was trained")


@pytest.mark.parametrize(
    ("method", "layers", "message"),
    [
        (f"{__name__}:failing", None, "fails with IndexError in test_student_loss.py"),
        (f"{__name__}:not_a_number", None, "not_a_number is nan for the first images, before any training.\nCorrect it"),
        (f"{__name__}:constant", None, "constant does not depend on the student's outputs"),
        (f"kd+{__name__}:of_the_teacher", None, "of_the_teacher does not depend on the student's outputs"),
        (f"{__name__}:with_wrong_gradient", None, "gradient of the loss .*with_wrong_gradient is not finite"),
        ("kd:1e300", None, "The loss kd is inf for the first images, before any training.\nGive it a smaller weight"),
        ("at", ["layer1=fc"], r"features are \[2, 8, 8\] in the student and \[10, 1, 1\] in the teacher"),
        ("catkd", ["layer1"], "no linear classifier from the 2 channels of layer 'layer1'"),
        ("fitnet", [], "The method fitnet matches features, and there is no pair of layers"),
    ],
)
def test_a_loss_that_cannot_work_is_refused_before_any_training(
    tmp_path: Path, method: str, layers: list[str] | None, message: str
) -> None:
    settings = replace(QUICK, method=method)
    with pytest.raises(KdxError, match=message):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=settings, layers=layers, report=nothing_is_trained)


def test_a_wrong_base_is_refused_before_any_training(tmp_path: Path, finished: Path) -> None:
    arguments: dict[str, Any] = {"teacher": TEACHER, "student": STUDENT, "out": tmp_path, "settings": QUICK, "report": nothing_is_trained}
    with pytest.raises(KdxError, match="There is no base checkpoint"):
        distill("digits", base=tmp_path / "missing.safetensors", **arguments)
    with pytest.raises(KdxError, match=r"another configuration: .*method.*differ"):
        distill("digits", base=finished / "student.safetensors", **arguments)
