"""Data references: labelled images that are decoded on demand."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kdx.errors import KdxError

Indices = NDArray[np.int64]

SPLITS = ("train", "validation", "test")

_SPLIT_FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class Dataset:
    """Labelled images that are decoded when asked for.

    ``labels`` [N] index ``classes``; ``ids`` name the images (a path relative to the folder, ``digits/0012``);
    ``fingerprint`` changes with the names, the labels and the files; ``splits`` holds what the data itself prescribes.
    """

    reference: str
    classes: tuple[str, ...]
    labels: Indices
    ids: tuple[str, ...]
    fingerprint: str
    reader: Callable[[int], Image.Image] = field(repr=False)
    splits: Mapping[str, Indices] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        """Image ``index`` as 8-bit RGB at its own size, upright; OSError, ValueError and the like for a corrupt one."""
        with self.reader(index) as image:
            return _rgb(image)


def open_data(reference: str, classes: Sequence[str] | None = None) -> Dataset:
    """The data set a reference names.

    ``digits``: scikit-learn's 1797 scans of handwritten digits, 8 x 8. ``cifar10:FOLDER``: the published binary version
    (``*.bin``), where test_batch.bin is the test split. Else a folder of class folders, FOLDER/class/*.jpg (also jpeg, png, bmp,
    webp, tif), or FOLDER/train/class/... beside val, valid or validation, and test, which are then the splits. Class folders are in
    natural order (2 before 10). With ``classes`` labels index those, and the data may hold some of them only.

    Raises KdxError for a folder that is missing or empty or has no class folders, for one class alone, and for a class that is not
    among ``classes``.
    """
    source, _, place = reference.partition(":")
    if reference == "digits":
        dataset = _open_digits()
    elif source == "cifar10" and place:
        dataset = _open_cifar10(reference, Path(place).expanduser())
    else:
        dataset = _open_folder(reference, Path(reference).expanduser())
    return dataset if classes is None else _relabelled(dataset, tuple(classes))


def _open_digits() -> Dataset:
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0 to 16
    labels = scans.target.astype(np.int64)
    ids = tuple(f"digits/{index:04d}" for index in range(len(labels)))
    classes = tuple(str(digit) for digit in range(10))
    return Dataset(
        "digits", classes, labels, ids, _fingerprint(ids, labels, [pixels.tobytes()]), lambda index: Image.fromarray(pixels[index])
    )


def _open_cifar10(reference: str, folder: Path) -> Dataset:
    files = sorted(folder.glob("*.bin"), key=lambda path: _natural(path.name)) if folder.is_dir() else []
    if not files:
        raise KdxError(
            f"There is no *.bin file in {folder}.",
            "Give the folder of CIFAR-10's binary version (cifar-10-batches-bin); the python version is pickled, which kdx does not read.",
        )
    for path in files:
        if path.stat().st_size == 0 or path.stat().st_size % _CIFAR_RECORD:
            raise KdxError(
                f"{path} is not whole records of {_CIFAR_RECORD} bytes.", "Unpack the archive again; CIFAR-100 has other records."
            )
    batches = [np.fromfile(path, dtype=np.uint8).reshape(-1, _CIFAR_RECORD) for path in files]
    records = np.concatenate(batches)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(_CIFAR10):
        raise KdxError(f"{folder} has a label {labels.max()}, which CIFAR-10 has not.", "Give the folder of CIFAR-10's binary version.")
    ids = tuple(f"{path.name}/{row:05d}" for path, batch in zip(files, batches, strict=True) for row in range(len(batch)))
    test = np.concatenate([np.full(len(batch), path.stem == "test_batch") for path, batch in zip(files, batches, strict=True)])
    splits = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)} if 0 < test.sum() < len(test) else {}

    def read(index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(records[index, 1:].reshape(3, 32, 32).transpose(1, 2, 0)))

    return Dataset(reference, _CIFAR10, labels, ids, _fingerprint(ids, labels, [records.tobytes()]), read, splits)


def _open_folder(reference: str, folder: Path) -> Dataset:
    if not folder.is_dir():
        problem = f"{folder} is not a folder." if folder.exists() else f"There is no folder {folder}."
        raise KdxError(problem, "A data reference is a folder of class folders, cifar10:FOLDER, or digits.")
    found = _prescribed(folder) or [(path, path.relative_to(folder).parts[0], "") for path in _images(folder)]
    if not found:
        raise _no_images(folder)
    classes = tuple(sorted({name for _, name, _ in found}, key=_natural))
    if len(classes) < 2:
        raise KdxError(
            f"{folder} has one class only, {classes[0]!r}.", "Relevance compares classes: give a folder with two class folders or more."
        )
    paths = [path for path, _, _ in found]
    ids = tuple(_written(path.relative_to(folder).as_posix()) for path in paths)
    labels = np.array([classes.index(name) for _, name, _ in found], dtype=np.int64)
    of = np.array([part for _, _, part in found])
    splits = {part: np.flatnonzero(of == part) for part in SPLITS if (of == part).any()}
    states = [path.stat() for path in paths]
    stamps = [f"{state.st_size} {state.st_mtime_ns}".encode() for state in states]
    return Dataset(reference, classes, labels, ids, _fingerprint(ids, labels, stamps), lambda index: Image.open(paths[index]), splits)


def _prescribed(folder: Path) -> list[tuple[Path, str, str]]:
    """Path, class and split of each image of FOLDER/train/class/...; nothing where the folder is not laid out so.

    ``train`` may be a class like any other (of vehicles): it is a split where it has class folders and no other class is beside it.
    """
    parts = [(top, _SPLIT_FOLDERS.get(top.name.lower(), "")) for top in _folders(folder)]
    found = [(path, path.relative_to(top).parts[0], part) for top, part in parts if part for path in _images(top)]
    beside = any(next(top.rglob(f"*{suffix}"), None) for top, part in parts if not part for suffix in _SUFFIXES)
    return found if not beside and any(part == "train" for _, _, part in found) else []


def _folders(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")), key=lambda path: _natural(path.name)
    )


def _images(root: Path) -> list[Path]:
    """The images in the class folders of ``root``, at any depth, in natural order."""
    paths = (path for top in _folders(root) for path in top.rglob("*"))
    kept = (path for path in paths if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file())
    return sorted(kept, key=lambda path: _natural(path.relative_to(root).as_posix()))


def _no_images(folder: Path) -> KdxError:
    if any(path.suffix.lower() in _SUFFIXES for path in folder.iterdir()):
        return KdxError(
            f"{folder} has images but no class folders.", "Put the images of each class into a folder with its name: FOLDER/cat/1.jpg."
        )
    return KdxError(
        f"{folder} has no images in class folders.", f"Give a folder FOLDER/class/image with images of kind {', '.join(_SUFFIXES)}."
    )


def _natural(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """A key that sorts 2 before 10; the text itself settles ties such as 01 and 1."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts), text


def _written(name: str) -> str:
    """A file's name as text that every file of a run can hold: bytes that are not UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _fingerprint(ids: Sequence[str], labels: Indices, contents: Sequence[bytes]) -> str:
    digest = hashlib.sha256("\n".join(ids).encode("utf-8", "surrogateescape"))
    digest.update(labels.tobytes())
    for content in contents:
        digest.update(content + b"\n")
    return digest.hexdigest()


def _relabelled(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    for name in dataset.classes:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3) or classes[:5]
            raise KdxError(
                f"The data has a class {name!r} that the models do not have.",
                f"Rename or remove its folder; near matches: {', '.join(near)}.",
            )
    labels = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)[dataset.labels]
    fingerprint = _fingerprint(dataset.ids, labels, [dataset.fingerprint.encode()])
    return Dataset(dataset.reference, classes, labels, dataset.ids, fingerprint, dataset.reader, dataset.splits)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: EXIF orientation applied, alpha over white, 16-bit scaled, palettes and CMYK converted. ``image`` itself may change."""
    ImageOps.exif_transpose(image, in_place=True)  # a copy of the whole image otherwise, as is convert to the mode that it has
    image.load()
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        levels = np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255)  # 65535 / 257 = 255
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    elif image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.rint(np.clip(levels * (255 if levels.max() <= 1 else 1), 0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
