"""Stored outputs of the teacher are those that it computes, and later students read them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdx.disk import lock_file
from kdx.distill import EpochResult, TrainingSettings, distill, teacher_outputs
from kdx.distill import data as distill_data
from kdx.errors import KdxError
from tests.distill.small import QUICK, STUDENT, TEACHER, files_of_at_most

PLAIN = replace(QUICK, augment=False, flip=False, student_images=60, epochs=2)


class Counted(nn.Module):
    """A teacher that counts the images it sees."""

    images = 0

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Counted.images += len(images)
        logits: torch.Tensor = self.head(self.layer2(self.layer1(images)).mean((2, 3)))
        return logits


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[str]:
    torch.save(Counted().state_dict(), tmp_path / "weights.pt")
    yield f"tests.distill.test_teacher_outputs:Counted@{tmp_path / 'weights.pt'}"


def losses(out: Path, teacher: str, settings: TrainingSettings, **keywords: Any) -> list[float]:
    results: list[EpochResult] = []
    distill("digits", teacher=teacher, student=STUDENT, out=out, settings=settings, device="cpu", report=results.append, **keywords)
    return [result.loss for result in results if result.network == "student" and result.loss is not None]


@pytest.mark.parametrize("method", ["at+kd", *(pytest.param(method, marks=pytest.mark.slow) for method in ("kd", "ofd", "catkd", "crd"))])
def test_students_learn_from_stored_outputs_as_from_computed_ones(
    tmp_path: Path, teacher: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(PLAIN, method=method)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_outputs, "CACHE_BYTES", 0)
        expected = losses(tmp_path / "computed", teacher, settings)
    assert losses(tmp_path / "memory", teacher, settings) == pytest.approx(expected, rel=1e-5)
    actual = losses(tmp_path / "stored", teacher, settings, teacher_cache=tmp_path / "cache")
    assert actual == pytest.approx(expected, rel=1e-5)
    (folder,) = (tmp_path / "cache").glob("[!.]*")
    logits = np.load(folder / "logits.npy")
    assert logits.shape == (60, 10) and logits.dtype == np.float32 and (logits.std(0) > 0).all()


@pytest.mark.slow
def test_the_teacher_computes_each_image_once_for_all_students(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(out: str, settings: TrainingSettings, **keywords: Any) -> int:
        Counted.images = 0
        losses(tmp_path / out, teacher, settings, **keywords)
        return Counted.images

    cache = {"teacher_cache": tmp_path / "cache"}
    memory, first = seen("memory", PLAIN), seen("first", PLAIN, **cache)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_outputs, "CACHE_BYTES", 0)
        every_step = seen("every step", PLAIN)
    assert every_step - memory == every_step - 2 - first == (PLAIN.epochs - 1) * 60  # two images tell how much memory outputs take
    assert seen("memory", PLAIN) < memory - 60  # a finished student needs no outputs
    assert first - seen("second", replace(PLAIN, seed=1, temperature=2.0, student_images=None), **cache) < 0  # other images
    assert first - seen("third", replace(PLAIN, learning_rate=0.01, temperature=2.0), **cache) == 60
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2
    monkeypatch.setattr(distill_data, "CACHE_BYTES", 0)  # images that are decoded in every epoch have the same places
    assert first - seen("fourth", PLAIN, **cache) == 60


def test_augmentation_excludes_stored_outputs(finished: Path, tmp_path: Path) -> None:
    teacher = f"{TEACHER}@{finished / 'teacher.safetensors'}"
    augmentations: dict[str, Any] = {"augment": True, "flip": True, "random_crop": 0.5, "mixup": 0.2}
    for name, value in augmentations.items():
        assert not PLAIN.images_vary and replace(PLAIN, **{name: value}).images_vary
    with pytest.raises(KdxError, match="cannot be stored, because augmentation"):
        losses(tmp_path / "out", teacher, replace(PLAIN, flip=True), teacher_cache=tmp_path / "cache")


def test_a_complete_store_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(KdxError, match="cannot be written: Read-only file system"):
        teacher_outputs.check_cache(PLAIN, tmp_path / "empty")
    (tmp_path / "full" / "0123").mkdir(parents=True)
    teacher_outputs.check_cache(PLAIN, tmp_path / "full")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_store_that_was_interrupted_is_written_again(tmp_path: Path, teacher: str) -> None:
    settings = replace(PLAIN, method="at")
    losses(tmp_path / "out", teacher, PLAIN)  # teacher and base
    (tmp_path / "out" / "student.safetensors").unlink()
    with files_of_at_most(10_000), pytest.raises(KdxError, match="cannot be written: File too large"):  # the second feature is larger
        losses(tmp_path / "out", teacher, settings, teacher_cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".teacher.lock"]
    assert len(losses(tmp_path / "out", teacher, settings, teacher_cache=tmp_path / "cache")) == 2


def test_the_store_may_be_in_the_output_folder(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is not that of the training, which this process has and would wait for without end."""
    monkeypatch.setattr(teacher_outputs, "lock_file", lambda path, wait: lock_file(path, wait=not wait))
    assert losses(tmp_path, teacher, replace(PLAIN, epochs=1), teacher_cache=tmp_path)
    assert (tmp_path / "models.toml").exists()
