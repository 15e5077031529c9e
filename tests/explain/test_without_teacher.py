"""The Explainer without a teacher: the remaining maps and scores are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdx.explain.results import Explanation
from tests.explain.small_networks import LAYERS, assert_without_teacher, explainer, files, images, labels


@pytest.mark.parametrize("runtime", ["eager", pytest.param("onnx", marks=pytest.mark.slow)])
def test_without_a_teacher_the_other_results_are_the_same(explained: Explanation[Any], runtime: str) -> None:
    with explainer(teacher=None, layers=list(LAYERS), runtime=runtime) as opened:
        assert_without_teacher(opened(images(), labels()), explained, 1e-4)
        assert list(opened.networks()) == ["student", "base"]


def test_two_files_without_a_teacher(folder: Path, explained: Explanation[Any]) -> None:
    with explainer(**files(folder) | {"teacher": None}, layers=list(LAYERS), runtime="auto") as opened:
        assert_without_teacher(opened(images(), labels()), explained, 1e-4)


def test_references_without_a_teacher() -> None:
    actual = []
    for settings in ({}, {"teacher": None, "layers": list(LAYERS)}):
        with explainer(**settings) as opened:
            opened.use_references(images(10, seed=5), torch.arange(10) % 4)
            actual.append(opened(images(), labels()))
    assert_without_teacher(actual[1], actual[0], 1e-6)
