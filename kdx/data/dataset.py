"""Data references: labelled images that are decoded on demand, from class folders, CIFAR-10 or scikit-learn's digits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.choices import COVER, Resizing
from kdx.data.class_folders import FolderImage, list_images, natural_key, utf8_name
from kdx.data.fingerprint import SourceFile, content_fingerprint, fingerprint_of_0_1_0, image_keys, stamps_of_0_1_0
from kdx.data.label_tables import read_label_table
from kdx.data.pixels import to_rgb
from kdx.errors import KdxError

Indices = NDArray[np.int64]

SPLITS = ("train", "validation", "test")

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class Dataset:
    """Labelled images that are decoded on demand.

    ``labels`` [N] index ``classes``. ``ids`` name the images (a path relative to the folder, or ``digits/0012``). ``files`` are the files
    that they are read from, by name. ``splits`` are the indices of the splits that the data itself defines. ``note`` is one line about
    what was left out of a folder (`kdx.data.class_folders.Listing.note`). ``relabelled_from`` is the data set with its own classes, if
    ``classes`` are those of models. ``resizing`` states how images are brought to the size of the networks.
    """

    reference: str
    classes: tuple[str, ...]
    labels: Indices
    ids: tuple[str, ...]
    files: Mapping[str, SourceFile] = field(repr=False)
    reader: Callable[[int], Image.Image] = field(repr=False)
    splits: Mapping[str, Indices] = field(default_factory=dict, repr=False)
    note: str = field(default="", repr=False)
    relabelled_from: Dataset | None = field(default=None, repr=False)
    resizing: Resizing = COVER

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        """Image ``index`` as upright 8-bit RGB at its own size; the first frame of an animation.

        A corrupt image raises OSError, ValueError or another exception.
        """
        with self.reader(index) as image:
            return to_rgb(image)

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the images, their names and their classes: see `kdx.data.fingerprint.content_fingerprint`.

        It depends neither on the folder's path nor on modification times, nor on the order of ``classes``.
        """
        return content_fingerprint(self.ids, [self.classes[label] for label in self.labels], self.files)

    @cached_property
    def image_keys(self) -> NDArray[np.uint64] | None:
        """A number per image [N] that identifies it in other folders (`kdx.data.fingerprint.image_keys`); None if images share files."""
        return image_keys(self.files) if tuple(self.files) == self.ids else None

    @cached_property
    def fingerprint_of_0_1_0(self) -> str:
        """The fingerprint that kdx 0.1.0 recorded. It changes with modification times and with the order of ``classes``."""
        original = self.relabelled_from
        stamps = stamps_of_0_1_0(self.ids, self.files) if original is None else [original.fingerprint_of_0_1_0.encode()]
        return fingerprint_of_0_1_0(self.ids, self.labels, stamps)


def open_data(reference: str, classes: Sequence[str] | None = None) -> Dataset:
    """The data set that a reference names.

    ``digits`` is scikit-learn's 1797 scans of handwritten digits, 8 x 8. ``cifar10:FOLDER`` is the published binary version
    (``*.bin``), where test_batch.bin is the test split. Any other reference is a folder of class folders, FOLDER/class/*.jpg (or any
    other type that Pillow decodes), or of splits: FOLDER/train/class/..., with val, valid or validation, and test. Class folders are in
    natural order (2 before 10). ``labels.csv`` lists images with their labels (`kdx.data.label_tables`). With ``classes``, labels index
    these classes, of which the data may contain only some.

    Raises KdxError for a folder that is missing or empty or has no class folders, for a class folder whose images Pillow does not decode
    here, for a single class, and for a class that is not in ``classes``.
    """
    source, _, folder = reference.partition(":")
    if reference == "digits":
        dataset = _open_digits()
    elif source == "cifar10" and folder:
        dataset = _open_cifar10(reference, Path(folder).expanduser())
    elif reference.lower().endswith(".csv") and not Path(reference).expanduser().is_dir():
        table = Path(reference).expanduser()
        dataset = _of_files(reference, table.parent, read_label_table(table), "")
    else:
        listing = list_images(Path(reference).expanduser())
        dataset = _of_files(reference, Path(reference).expanduser(), listing.images, listing.note())
    return dataset if classes is None else _relabelled(dataset, tuple(classes))


def located(reference: str) -> str:
    """The data reference with the absolute path of its folder, without symbolic links. A relative path starts at the current folder."""
    source, colon, folder = reference.partition(":")
    if reference == "digits":
        return reference
    if source == "cifar10" and folder:
        return f"{source}{colon}{Path(folder).expanduser().resolve()}"
    return str(Path(reference).expanduser().resolve())


def _open_digits() -> Dataset:
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0 to 16
    labels = scans.target.astype(np.int64)
    ids = tuple(f"digits/{index:04d}" for index in range(len(labels)))
    classes = tuple(str(digit) for digit in range(10))
    return Dataset("digits", classes, labels, ids, {"digits": pixels.tobytes()}, lambda index: Image.fromarray(pixels[index]))


def _open_cifar10(reference: str, folder: Path) -> Dataset:
    files = sorted(folder.glob("*.bin"), key=lambda path: natural_key(path.name)) if folder.is_dir() else []
    if not files:
        raise KdxError(
            f"There is no *.bin file in {folder}.",
            "Give the folder of CIFAR-10's binary version (cifar-10-batches-bin); kdx does not read the pickled Python version.",
        )
    for path in files:
        if path.stat().st_size == 0 or path.stat().st_size % _CIFAR_RECORD:
            raise KdxError(
                f"The size of {path} is not a multiple of {_CIFAR_RECORD} bytes.",
                "Unpack the archive of CIFAR-10 again; CIFAR-100 has records of another size.",
            )
    batches = [np.fromfile(path, dtype=np.uint8).reshape(-1, _CIFAR_RECORD) for path in files]
    records = np.concatenate(batches)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(_CIFAR10):
        raise KdxError(
            f"{folder} has a label {labels.max()}, which CIFAR-10 does not have.", "Give the folder of CIFAR-10's binary version."
        )
    ids = tuple(f"{path.name}/{row:05d}" for path, batch in zip(files, batches, strict=True) for row in range(len(batch)))
    test = np.concatenate([np.full(len(batch), path.stem == "test_batch") for path, batch in zip(files, batches, strict=True)])
    splits = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)} if 0 < test.sum() < len(test) else {}

    def read(index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(records[index, 1:].reshape(3, 32, 32).transpose(1, 2, 0)))

    return Dataset(reference, _CIFAR10, labels, ids, {path.name: path for path in files}, read, splits)


def _of_files(reference: str, folder: Path, images: Sequence[FolderImage], note: str) -> Dataset:
    """The data set of image files below a folder."""
    classes = tuple(sorted({image.class_name for image in images}, key=natural_key))
    if len(classes) < 2:
        raise KdxError(
            f"{reference} has only one class, {classes[0]!r}.", "Relevance compares classes: give images of two classes or more."
        )
    paths = [image.path for image in images]
    ids = tuple(utf8_name(_relative(path, folder)) for path in paths)
    labels = np.array([classes.index(image.class_name) for image in images], dtype=np.int64)
    split_names = np.array([image.split for image in images])
    splits = {name: np.flatnonzero(split_names == name) for name in SPLITS if (split_names == name).any()}
    files = dict(zip(ids, paths, strict=True))
    return Dataset(reference, classes, labels, ids, files, lambda index: Image.open(paths[index]), splits, note)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _relabelled(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    for name in dataset.classes:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3) or classes[:5]
            raise KdxError(
                f"The data has a class {name!r} that the models do not have.",
                f"Rename or remove its folder; near matches: {', '.join(near)}.",
            )
    labels = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)[dataset.labels]
    return replace(dataset, classes=classes, labels=labels, relabelled_from=dataset)
