"""NumPy files of images and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdx.data import open_data
from kdx.data.dataset import located
from kdx.errors import KdxError

_LEVELS = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)


def saved(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "data.npz", **arrays)
    return str(folder / "data.npz")


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (_LEVELS, _LEVELS),
        (_LEVELS[..., 0], np.repeat(_LEVELS[..., :1], 3, axis=3)),
        (_LEVELS[..., :1], np.repeat(_LEVELS[..., :1], 3, axis=3)),
        (_LEVELS / 255, _LEVELS),
        ((_LEVELS / 255).astype(np.float32)[:, ::-1], _LEVELS[:, ::-1]),
    ],
)
def test_images_are_their_levels(tmp_path: Path, images: NDArray[Any], expected: NDArray[np.uint8]) -> None:
    reference = saved(tmp_path, images=images, labels=[3, 10, 3, 2])
    for dataset in (open_data(reference), open_data(f"npz:{reference}")):
        assert dataset.classes == ("2", "3", "10") and dataset.labels.tolist() == [1, 2, 1, 0] and dataset.splits == {}
        for index in range(4):
            np.testing.assert_array_equal(np.asarray(dataset.read(index)), expected[index])
    assert located(f"npz:{reference}") == located(reference) == str(Path(reference).resolve())


def test_classes_and_splits_are_named(tmp_path: Path) -> None:
    names = np.array(["owl", "hen", "emu"])
    dataset = open_data(
        saved(
            tmp_path,
            images=_LEVELS,
            labels=[1, 0, 1, 0],
            test_images=_LEVELS[:2, :3],
            test_labels=np.array([0, 1], np.uint8),
            classes=names,
        )
    )
    assert dataset.classes == ("owl", "hen", "emu") and dataset.labels.tolist() == [1, 0, 1, 0, 0, 1]
    assert {name: part.tolist() for name, part in dataset.splits.items()} == {"train": [0, 1, 2, 3], "test": [4, 5]}
    assert dataset.ids[3:5] == ("train/000003", "test/000000") and dataset.read(5).size == (6, 3)
    named = open_data(saved(tmp_path, train_images=_LEVELS, train_labels=["hen", "owl", "hen", "owl"], classes=names))
    assert named.labels.tolist() == [1, 0, 1, 0]
    assert open_data(saved(tmp_path, images=_LEVELS, labels=["b10", "b9", "b9", "b10"])).classes == ("b9", "b10")


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({}, "has no images"),
        ({"images": _LEVELS}, "one entry of labels per entry of images"),
        ({"images": _LEVELS, "labels": [1, 2]}, "one entry of labels per entry of images"),
        ({"images": _LEVELS, "labels": [1, 2, 1, 2], "train_images": _LEVELS, "train_labels": [1, 2, 1, 2]}, "train_images beside images"),
        ({"images": _LEVELS, "labels": [1, 2, 1, 2], "x": [1]}, "an array 'x'"),
        ({"images": _LEVELS, "labels": [1.0, 2.0, 1.0, 2.0]}, "neither integers nor names"),
        ({"images": _LEVELS, "labels": [0, 1, 2, 1], "classes": ["a", "b"]}, "label 2 .* is not one of its classes"),
        ({"images": _LEVELS, "labels": [0, 1, 0, 1], "classes": ["a", "a"]}, "not different names"),
        ({"images": _LEVELS.astype(np.int64), "labels": [0, 1, 0, 1]}, "type int64"),
        ({"images": _LEVELS[..., :2], "labels": [0, 1, 0, 1]}, "have shape"),
        ({"images": _LEVELS.astype(np.float32), "labels": [0, 1, 0, 1]}, r"not in \[0, 1\]"),
        ({"images": np.full((4, 2, 2), np.nan), "labels": [0, 1, 0, 1]}, r"not in \[0, 1\]"),
        ({"images": _LEVELS, "labels": [7, 7, 7, 7]}, "only one class, '7'"),
        ({"images": _LEVELS, "labels": np.array(["a", 1, "b", 2], dtype=object)}, "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, arrays: dict[str, Any], problem: str) -> None:
    with pytest.raises(KdxError, match=problem):
        open_data(saved(tmp_path, **arrays))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = Path(saved(tmp_path, images=_LEVELS, labels=[0, 1, 0, 1]))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(KdxError, match="cannot be read"):
        open_data(str(path))
    with pytest.raises(KdxError, match="cannot be read"):
        open_data(str(tmp_path / "none.npz"))
