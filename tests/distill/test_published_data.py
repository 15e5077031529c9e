"""Data sets as they are published, from training to the split that is explained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdx.data import open_data
from kdx.distill import distill
from kdx.models import models_file
from kdx.runs.split import choose_split
from tests.data.test_cifar import write_cifar10
from tests.data.test_hugging_face import write
from tests.distill.small import QUICK, STUDENT, TEACHER

SETTINGS = replace(QUICK, epochs=1, teacher_epochs=1, student_images=None, batch=4)


def _npz(root: Path) -> str:
    levels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(root / "data.npz", images=levels[:30], labels=np.arange(30) % 2, test_images=levels[30:], test_labels=np.arange(10) % 2)
    return str(root / "data.npz")


def _named_files(root: Path) -> str:
    for name in ("cat", "dog"):
        for index in range(20):
            path = root / "train" / f"{name}.{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.random.default_rng(index).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(path)
    (root / "train" / "cat.0.jpg").write_bytes(b"")
    return str(root)


def _hugging_face(root: Path) -> str:
    return f"hfdata:{write('saved', root / 'saved', repeats=5)}"


def _cifar10(root: Path) -> str:
    write_cifar10(root / "cifar", "python", repeats=8)
    return f"cifar10:{root / 'cifar'}"


@pytest.mark.parametrize(
    "source", [pytest.param(_npz, marks=pytest.mark.slow), _named_files, _hugging_face, pytest.param(_cifar10, marks=pytest.mark.slow)]
)
def test_the_test_split_is_explained_wherever_the_data_are(tmp_path: Path, source: Callable[[Path], str]) -> None:
    (tmp_path / "data").mkdir()
    reference = source(tmp_path / "data")
    data = open_data(reference)
    models = models_file.read_models(
        distill(reference, teacher=TEACHER, student=STUDENT, out=tmp_path / "out", settings=SETTINGS, report=lambda _: None)
    )
    assert models.classes == data.classes and models.training["unreadable_images"] == (source is _named_files)
    choice = choose_split(data, models, None, 0)
    assert choice.name == "test" and 0 < len(choice.indices) < len(data)
    if "test" in data.splits:
        assert choice.indices.tolist() == data.splits["test"].tolist()
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    copy = open_data(reference.replace(str(tmp_path / "data"), str(tmp_path / "copy")))
    assert choose_split(copy, models, None, 0).indices.tolist() == choice.indices.tolist()
