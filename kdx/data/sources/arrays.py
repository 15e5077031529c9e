"""Images and labels in a NumPy file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.data.class_folders import natural_key
from kdx.data.labelled_images import SPLITS, Dataset, splits_by_name
from kdx.data.numbered_names import NumberedNames
from kdx.errors import KdxError, first_line

_KEYS = "Give images [n, h, w] or [n, h, w, 3 or 1], as uint8 or as numbers in [0, 1], and labels [n] as integers or names."


def open_npz(reference: str, place: str) -> Dataset:
    """The images in a ``.npz`` file.

    images: [n, h, w] or [n, h, w, c] with 1 or 3 channels, uint8, or floating-point numbers in [0, 1], which are rounded to 8-bit levels.
    labels: [n], names, or integers. classes (optional): the names [k] that integer labels index; otherwise the integers are the names.
    ``train_images`` and ``train_labels``, and the same with ``validation_`` and ``test_``, are the images of splits; ``images`` and
    ``labels`` beside them are the split train. Images of different splits may differ in size. Nothing is unpickled. The images are held in
    memory.

    Raises KdxError for a file that cannot be read, and for arrays of other names, shapes and values.
    """
    path = Path(place).expanduser()
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except Exception as error:  # NumPy raises many types on damaged files and on files of pickled objects
        raise KdxError(
            f"The data {path} cannot be read: {first_line(error)}.", "Write the file with numpy.savez, without objects."
        ) from error
    parts = _parts(path, arrays)
    names, labels = _labels(path, [part_labels for _, _, part_labels in parts], arrays.get("classes"))
    levels = [_levels(path, images) for _, images, _ in parts]
    ids = NumberedNames([(split or "images", len(images)) for split, images, _ in parts])
    counts = [len(images) for images in levels]
    splits = splits_by_name(np.repeat([split for split, _, _ in parts], counts).tolist()) if len(parts) > 1 else {}

    def read(index: int) -> Image.Image:
        part, row = ids.place(index)
        return Image.fromarray(levels[part][row])

    return Dataset(reference, names, labels, ids, {path.name: path}, read, splits)


def _parts(path: Path, arrays: dict[str, NDArray[Any]]) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """The (split, images, labels) in a file."""
    parts = []
    for split, prefix in (("train", ""), *((split, f"{split}_") for split in SPLITS)):
        images, labels = arrays.pop(f"{prefix}images", None), arrays.pop(f"{prefix}labels", None)
        if images is None and labels is None:
            continue
        if images is None or labels is None or labels.ndim != 1 or images.ndim == 0 or len(images) != len(labels) or len(labels) == 0:
            raise KdxError(f"{path} does not have one entry of {prefix}labels per entry of {prefix}images.", _KEYS)
        parts.append((split, images, labels))
    unknown = sorted(arrays.keys() - {"classes"})
    if not parts or unknown or len({split for split, _, _ in parts}) < len(parts):
        problem = f"has an array {unknown[0]!r}, which kdx does not know" if unknown else "has no images, or train_images beside images"
        raise KdxError(f"{path} {problem}.", _KEYS)
    return parts


def _labels(path: Path, parts: list[NDArray[Any]], classes: NDArray[Any] | None) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The names of the classes, and the labels [n] of all parts."""
    kinds = {part.dtype.kind for part in parts}
    if not kinds <= {"i", "u"} and kinds != {"U"}:
        raise KdxError(f"The labels in {path} are neither integers nor names.", _KEYS)
    joined = np.concatenate(parts)
    if classes is None:
        values = sorted(np.unique(joined).tolist(), key=lambda value: natural_key(value) if isinstance(value, str) else value)
        names = tuple(str(value) for value in values)
    elif classes.ndim != 1 or classes.dtype.kind != "U" or len(set(classes.tolist())) != len(classes):
        raise KdxError(f"The classes in {path} are not different names [k].", _KEYS)
    else:
        names = tuple(classes.tolist())
        values = list(names) if kinds == {"U"} else list(range(len(names)))
    numbers = {value: number for number, value in enumerate(values)}
    present, places = np.unique(joined, return_inverse=True)
    missing = [value for value in joined.tolist() if value not in numbers] if not numbers.keys() >= {*present.tolist()} else []
    if missing:
        raise KdxError(f"The label {missing[0]!r} in {path} is not one of its classes.", "Name all classes in the array classes.")
    return names, np.array([numbers[value] for value in present.tolist()], dtype=np.int64)[places]


def _levels(path: Path, images: NDArray[Any]) -> NDArray[np.uint8]:
    """Images as 8-bit levels [n, h, w] or [n, h, w, 3]."""
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    is_float = images.dtype.kind == "f"
    if (images.ndim != 3 and images.shape[3:] != (3,)) or 0 in images.shape or not (is_float or images.dtype == np.uint8):
        raise KdxError(f"The images in {path} have shape {list(images.shape)} and type {images.dtype}.", _KEYS)
    if not is_float:
        return images
    if not (images.min() >= 0 and images.max() <= 1):  # false for NaN, too
        raise KdxError(f"The images in {path} are not in [0, 1].", "Divide levels by 255, or store them as uint8.")
    levels: NDArray[np.uint8] = np.rint(images * 255).astype(np.uint8)
    return levels
