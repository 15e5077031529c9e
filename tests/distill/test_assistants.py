"""Chains of teacher assistants: the same as one distillation after another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdx.distill import EpochResult, distill
from kdx.errors import KdxError
from kdx.export.graphs import Preprocessing
from kdx.models import load, models_file
from kdx.models.checkpoint_files import recorded_preprocessing
from tests.distill.small import QUICK, STUDENT, TEACHER, summaries

ASSISTANT = "kdx:resnet,width=3,depth=1,stages=2"
SETTINGS = replace(QUICK, epochs=1, method="kd+fitnet:0.1")


def of_other_classes() -> nn.Module:
    """A network that does not have the classes of the data."""
    return load("kdx:resnet,width=2,depth=1,stages=2,classes=9").module


@pytest.fixture(scope="module")
def teacher(finished: Path) -> str:
    return f"{TEACHER}@{finished / 'teacher.safetensors'}"


@pytest.mark.slow
def test_a_chain_is_one_distillation_after_another(teacher: str, tmp_path: Path) -> None:
    results: list[EpochResult] = []
    chain = tmp_path / "chain"
    path = distill("digits", teacher=teacher, assistants=[ASSISTANT], student=STUDENT, out=chain, settings=SETTINGS, report=results.append)
    assert summaries(results) == [
        ("assistant-1/teacher", 1, False),
        ("assistant-1/base", 1, True),
        ("assistant-1/student", 1, True),
        ("teacher", 1, False),
        ("base", 1, True),
        ("student", 1, True),
    ]
    distill("digits", teacher=teacher, assistants=[ASSISTANT], student=STUDENT, out=chain, settings=SETTINGS, report=results.append)
    assert {trained for _, _, trained in summaries(results[6:])} == {False}  # everything is there already
    distill("digits", teacher=teacher, student=ASSISTANT, out=tmp_path / "a", settings=SETTINGS, report=results.append)
    step = f"{ASSISTANT}@{tmp_path / 'a' / 'student.safetensors'}"
    distill("digits", teacher=step, student=STUDENT, out=tmp_path / "b", settings=SETTINGS, report=results.append)
    for ours, theirs in ((chain / "assistant-1", tmp_path / "a"), (chain, tmp_path / "b")):
        for role in ("teacher", "base", "student"):
            expected, actual = load_file(theirs / f"{role}.safetensors"), load_file(ours / f"{role}.safetensors")
            assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert models_file.read_models(path).teacher == f"{ASSISTANT},classes=10@teacher.safetensors"
    assert models_file.read_models(chain / "assistant-1" / "models.toml").student == f"{ASSISTANT},classes=10@student.safetensors"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"base": "nowhere/base.safetensors"}, "There is no base checkpoint nowhere/base.safetensors"),
        ({"teacher_cache": "cache"}, "cannot be stored, because augmentation changes the images"),
        ({"log": ["nonsense"]}, "There is no log 'nonsense'"),
        ({"layers": ["layer9"]}, "Student: The network has no layer 'layer9'"),
        ({"layers": ["layer1=layer9"]}, "Teacher: The network has no layer 'layer9'"),
        ({"student": "tests.distill.test_assistants:of_other_classes"}, "The student has 9 classes, and the data has 10"),
    ],
)
def test_what_the_last_student_needs_is_checked_before_an_assistant_is_trained(
    arguments: dict[str, Any], problem: str, teacher: str, tmp_path: Path
) -> None:
    with pytest.raises(KdxError, match=problem):
        distill(
            "digits",
            **{"teacher": teacher, "assistants": [ASSISTANT], "student": STUDENT, "settings": SETTINGS, **arguments},
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_a_network_that_kdx_trained_teaches_with_the_preprocessing_of_its_training(teacher: str, finished: Path, tmp_path: Path) -> None:
    """The resolution is not given again, and the statistics are those of the first step, whatever the source of the second teacher."""
    trained = models_file.read_models(finished / "models.toml").load("student")
    assert recorded_preprocessing(finished / "student.safetensors") == trained.preprocessing
    settings = replace(SETTINGS, image_size=None, student_images=20)
    path = distill("digits", teacher=teacher, student=STUDENT, out=tmp_path, settings=settings, report=lambda result: None)
    assert models_file.read_models(path).load("student").preprocessing == trained.preprocessing
    assert isinstance(recorded_preprocessing(tmp_path / "base.safetensors"), Preprocessing)
    assert recorded_preprocessing(tmp_path / "teacher.safetensors") is None  # a copy of weights that were given
    assert recorded_preprocessing(tmp_path / "none.safetensors") is None
