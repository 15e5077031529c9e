"""Data references: class folders, CIFAR-10 and digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.errors import KdxError
from tests.data.pictures import class_folders, picture


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    scans = load_digits()
    digits = open_data("digits")
    assert (len(digits), digits.classes, digits.ids[12]) == (1797, tuple("0123456789"), "digits/0012")
    np.testing.assert_array_equal(digits.labels, scans.target)
    image = np.asarray(digits.read(12))
    assert image.shape == (8, 8, 3)
    np.testing.assert_array_equal(np.rint(image[:, :, 1] / 255 * 16), scans.images[12])
    assert open_data("digits").fingerprint == digits.fingerprint


def test_class_folders_are_in_natural_order(tmp_path: Path) -> None:
    for name in ("class10/img10.PNG", "class10/img9.jpg", "class2/deep/a.webp", "Class1/b.tif"):
        picture(tmp_path / name)
    (tmp_path / "class2" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    picture(tmp_path / ".cache" / "c.png")
    picture(tmp_path / "class2" / ".hidden.png")
    dataset = open_data(str(tmp_path))
    assert dataset.classes == ("Class1", "class2", "class10")
    assert dataset.ids == ("Class1/b.tif", "class2/deep/a.webp", "class10/img9.jpg", "class10/img10.PNG")
    assert dataset.labels.tolist() == [0, 1, 2, 2]
    assert not dataset.splits


def test_train_may_be_a_class(tmp_path: Path) -> None:
    assert open_data(str(class_folders(tmp_path, {"bus": 2, "train": 3}))).classes == ("bus", "train")


def test_cifar10_is_read_from_records(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    labels = np.array([3, 0, 9, 9, 1, 2, 3], dtype=np.uint8)
    records = np.concatenate([labels[:, None], pixels.reshape(7, -1)], axis=1)
    records[4:].tofile(tmp_path / "test_batch.bin")
    records[:4].tofile(tmp_path / "data_batch_1.bin")
    dataset = open_data(f"cifar10:{tmp_path}")
    assert dataset.labels.tolist() == labels.tolist()
    assert (dataset.classes[9], dataset.ids[5]) == ("truck", "test_batch.bin/00001")
    np.testing.assert_array_equal(np.asarray(dataset.read(5)), pixels[5].transpose(1, 2, 0))
    assert dataset.splits["test"].tolist() == [4, 5, 6]
    assert torch.equal(load_images(dataset, [5], (32, 32)).pixels[0], torch.from_numpy(pixels[5]) / 255)


@pytest.mark.parametrize("content", [None, b"", b"x" * 3072, bytes([10]) + b"x" * 3072])
def test_an_invalid_cifar_folder_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(KdxError):
        open_data(f"cifar10:{tmp_path}")


def test_folders_without_a_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="There is no folder"):
        open_data(str(tmp_path / "none"))
    with pytest.raises(KdxError, match="no images in class folders"):
        open_data(str(tmp_path))
    picture(tmp_path / "1.png")
    with pytest.raises(KdxError, match="is not a folder"):
        open_data(str(tmp_path / "1.png"))
    with pytest.raises(KdxError, match="images but no class folders"):
        open_data(str(tmp_path))
    class_folders(tmp_path, {"cat": 3})
    with pytest.raises(KdxError, match="only one class, 'cat'"):
        open_data(str(tmp_path))


def test_labels_index_the_classes_of_the_models(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 1, "dog": 2})
    assert open_data(str(tmp_path), classes=("ant", "dog", "emu", "cat")).labels.tolist() == [3, 1, 1]
    with pytest.raises(KdxError, match=r"'dog' that the models do not have.\n.*dogs"):
        open_data(str(tmp_path), classes=("cat", "dogs", "emu"))
