"""A training on a GPU that was stopped ends with the same weights, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdx.choices import TrainingPrecision
from kdx.distill import EpochResult, distill
from tests.distill.small import QUICK, STUDENT, TEACHER, Interruption, stop_at

pytestmark = pytest.mark.gpu
METHODS = "kd+at:0.1+fitnet:0.01+crd,negatives=32,width=8:0.1+reviewkd:0.1"
FILES = ("teacher.safetensors", "base.safetensors", "student.safetensors")


def silent(_result: EpochResult) -> None:
    pass


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stopped_training_resumes_to_the_same_weights(precision: TrainingPrecision, tmp_path: Path) -> None:
    settings = replace(QUICK, method=METHODS, precision=precision)
    arguments: dict[str, Any] = {"teacher": TEACHER, "student": STUDENT, "settings": settings, "device": "cuda"}
    for name in ("whole", "again"):
        distill("digits", out=tmp_path / name, report=silent, **arguments)
    for network, epoch in (("teacher", 1), ("base", 2), ("student", 1), ("student", 2)):
        with pytest.raises(Interruption):
            distill("digits", out=tmp_path / "stopped", report=stop_at(network, epoch), **arguments)
    distill("digits", out=tmp_path / "stopped", report=silent, **arguments)
    for file in FILES:
        whole = (tmp_path / "whole" / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == whole, f"two trainings differ in {file}"
        assert (tmp_path / "stopped" / file).read_bytes() == whole, f"the stopped training differs in {file}"
