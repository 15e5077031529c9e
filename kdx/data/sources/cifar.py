"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009) as they are published.

The binary version has records of labels and pixels, and the Python version has pickled batches. Both contain the same images in the same
order. The published test images are the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.data.class_folders import natural_key
from kdx.data.labelled_images import Dataset
from kdx.data.sources.pickled_arrays import read_pickled_dictionary
from kdx.errors import KdxError

_PIXELS = 3 * 32 * 32

_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class _Version:
    """A published version of CIFAR.

    name: its name. archives: the folders that its two archives contain. batches: patterns of the names of pickled batches. test: the name
    of the test batch, without suffix. label_key: the key of the labels in a pickled batch. label_bytes: the labels at the beginning of a
    binary record, of which the last is used.
    """

    name: str
    archives: tuple[str, str]
    batches: tuple[str, ...]
    test: str
    label_key: str
    label_bytes: int


_CIFAR10 = _Version(
    "CIFAR-10", ("cifar-10-batches-bin", "cifar-10-batches-py"), ("data_batch_[0-9]", "test_batch"), "test_batch", "labels", 1
)
_CIFAR100 = _Version("CIFAR-100", ("cifar-100-binary", "cifar-100-python"), ("train", "test"), "test", "fine_labels", 2)


@dataclass(frozen=True)
class _Batch:
    """One file: pixels uint8 [n, 3072], channels first, and labels [n]."""

    path: Path
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def open_cifar10(reference: str, place: str) -> Dataset:
    """CIFAR-10, in the folder of either version or the folder that contains it. Raises KdxError for files that are damaged."""
    _, batches = _read_batches(_CIFAR10, Path(place).expanduser())
    return _joined(reference, _CIFAR10, batches, _CIFAR10_CLASSES)


def open_cifar100(reference: str, place: str) -> Dataset:
    """CIFAR-100 with its 100 fine labels, as `open_cifar10`. The names of the classes are those of ``fine_label_names.txt`` or ``meta``."""
    folder, batches = _read_batches(_CIFAR100, Path(place).expanduser())
    names, meta = folder / "fine_label_names.txt", folder / "meta"
    if names.is_file():
        classes = names.read_text("utf-8", errors="backslashreplace").split()
    elif meta.is_file():
        classes = read_pickled_dictionary(meta).get("fine_label_names", [])
    else:
        raise KdxError(
            f"{folder} does not have the names of the classes.",
            "Unpack fine_label_names.txt (binary version) or meta (Python version) too.",
        )
    if not isinstance(classes, list) or len(classes) != 100 or len(set(map(str, classes))) != 100:
        raise KdxError(f"{folder} does not name the 100 fine classes of CIFAR-100.", "Unpack the published archive again.")
    return _joined(reference, _CIFAR100, batches, tuple(map(str, classes)))


def _read_batches(version: _Version, place: Path) -> tuple[Path, list[_Batch]]:
    """The folder that contains the batches, and the batches in natural order, with the test batch last."""
    for folder in (place, *(place / archive for archive in version.archives)):
        binary = list(folder.glob("*.bin"))
        pickled = [path for pattern in version.batches for path in folder.glob(pattern) if path.is_file()]
        if binary or pickled:
            paths = sorted(binary or pickled, key=lambda path: (path.stem == version.test, natural_key(path.name)))
            read = _read_binary if binary else _read_pickled
            return folder, [read(version, path) for path in paths]
    raise KdxError(
        f"There are no files of {version.name} in {place}.",
        f"Give the folder {' or '.join(version.archives)} of the published archive, or the folder that contains it.",
    )


def _read_binary(version: _Version, path: Path) -> _Batch:
    record = version.label_bytes + _PIXELS
    size = path.stat().st_size
    if size == 0 or size % record:
        raise KdxError(
            f"The size of {path} is not a multiple of the {record} bytes of a record of {version.name}.",
            "Unpack the archive again; CIFAR-10 and CIFAR-100 have records of different sizes.",
        )
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, record)
    return _Batch(path, records[:, version.label_bytes :], records[:, version.label_bytes - 1].astype(np.int64))


def _read_pickled(version: _Version, path: Path) -> _Batch:
    content = read_pickled_dictionary(path)
    pixels, labels = content.get("data"), content.get(version.label_key)
    is_valid = (
        isinstance(pixels, np.ndarray)
        and pixels.shape[1:] == (_PIXELS,)
        and isinstance(labels, list)
        and len(labels) == len(pixels) > 0
        and all(type(label) is int and 0 <= label < 256 for label in labels)
    )
    if not is_valid:
        raise KdxError(f"The pickle {path} is not a batch of {version.name}.", "Unpack the published archive again.")
    return _Batch(path, np.asarray(pixels), np.array(labels, dtype=np.int64))


def _joined(reference: str, version: _Version, batches: Sequence[_Batch], classes: tuple[str, ...]) -> Dataset:
    labels = np.concatenate([batch.labels for batch in batches])
    if labels.max() >= len(classes):
        raise KdxError(
            f"{batches[0].path.parent} has a label {labels.max()}, which {version.name} does not have.",
            "Check that the folder is that of the published archive.",
        )
    pixels = [row for batch in batches for row in batch.pixels]  # views of the batches
    ids = tuple(f"{batch.path.name}/{row:05d}" for batch in batches for row in range(len(batch.labels)))
    is_test = np.concatenate([np.full(len(batch.labels), batch.path.stem == version.test) for batch in batches])
    splits = {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)} if 0 < is_test.sum() < len(is_test) else {}

    def read(index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels[index].reshape(3, 32, 32).transpose(1, 2, 0)))

    return Dataset(reference, classes, labels, ids, {batch.path.name: batch.path for batch in batches}, read, splits)
