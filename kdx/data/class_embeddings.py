"""Class embeddings, and rows by image, from a file: what relevance is measured against in place of one-hot labels."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError, first_line

_FORMS = "Give .npy [classes, e] in the order of the classes, .npz with one array per class name, or .csv or .parquet with names first."

_IMAGE_FORMS = "Give .npz with one array per image, or .csv or .parquet with the image's id first, as in samples.parquet of a run."


@dataclass(frozen=True, eq=False)
class ClassEmbeddings:
    """One row per class, in the order of the classes.

    rows: float64 [classes, e]. file: the name of the file. sha256: the hash of the rows, which does not depend on the file's form.
    """

    rows: NDArray[np.float64]
    file: str
    sha256: str

    def of(self, labels: NDArray[np.integer]) -> NDArray[np.float64]:
        """The embedding [n, e] of labels [n]."""
        rows: NDArray[np.float64] = self.rows[labels]
        return rows


def read_class_embeddings(path: Path, classes: Sequence[str]) -> ClassEmbeddings:
    """The embeddings of ``classes`` in a file.

    ``.npy``: an array [classes, e], in the order of the classes. ``.npz``: one array [e] per class, under its name. ``.csv`` and
    ``.parquet``: one row per class, its name in the first column and numbers in the others; in ``.csv`` the first row may be a header.
    A file with names may contain further classes. Nothing is unpickled.

    Raises KdxError for a file that cannot be read, lacks a class, has a class twice, or contains anything but finite numbers, and for
    classes of which fewer than two differ.
    """
    readers = {".npy": _of_npy, ".npz": _of_npz, ".csv": _of_csv, ".parquet": _of_parquet}
    if path.suffix not in readers:
        raise KdxError(f"{path} is not a file of class embeddings that kdx reads.", _FORMS)
    try:
        rows = readers[path.suffix](path, classes)
    except KdxError:
        raise
    except Exception as error:  # NumPy's and Arrow's readers raise many types on damaged files
        raise KdxError(f"The class embeddings {path} cannot be read: {first_line(error)}.", _FORMS) from error
    if rows.ndim != 2 or rows.shape[1] == 0 or not np.isfinite(rows).all():
        raise KdxError(f"The class embeddings {path} are not finite numbers with one row per class.", _FORMS)
    if (rows == rows[:1]).all():
        raise KdxError(f"The class embeddings {path} are the same for all classes.", "Give at least two classes that differ.")
    return ClassEmbeddings(rows, path.name, hashlib.sha256(f"{rows.shape}".encode() + rows.astype("<f8").tobytes()).hexdigest())


def read_image_rows(path: Path, ids: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The rows of images, by their ids, in a file of `read_class_embeddings` with names, in which the names are those of images.

    Rows of other names are left out, and ids may be missing. Raises KdxError for a file that cannot be read or has rows of different
    lengths or numbers that are not finite.
    """
    readers = {".npz": _npz_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise KdxError(f"{path} is not a file of rows by image that kdx reads.", _IMAGE_FORMS)
    try:
        pairs = readers[path.suffix](path, set(ids))
        rows = {name: np.asarray(row, dtype=np.float64) for name, row in pairs}
    except Exception as error:  # NumPy's and Arrow's readers raise many types on damaged files
        raise KdxError(f"The rows of images in {path} cannot be read: {first_line(error)}.", _IMAGE_FORMS) from error
    if len(rows) < len(pairs):
        raise KdxError(f"The rows of images in {path} have an image twice.", "Give one row per image.")
    if len({row.shape for row in rows.values()}) > 1 or not all(
        row.ndim == 1 and len(row) and np.isfinite(row).all() for row in rows.values()
    ):
        raise KdxError(f"The rows of images in {path} are not finite numbers of one length.", _IMAGE_FORMS)
    return rows


def _of_npy(path: Path, classes: Sequence[str]) -> NDArray[np.float64]:
    rows = np.load(path, allow_pickle=False)
    if rows.ndim != 2 or len(rows) != len(classes):
        raise KdxError(
            f"The class embeddings {path} have shape {list(rows.shape)}, and there are {len(classes)} classes.",
            "Give one row per class, in the order of the classes, or a file that names the classes.",
        )
    return _numbers(rows)


def _of_npz(path: Path, classes: Sequence[str]) -> NDArray[np.float64]:
    return _in_order(path, _npz_rows(path, set(classes)), classes)


def _npz_rows(path: Path, names: Collection[str]) -> list[tuple[str, Any]]:
    with np.load(path, allow_pickle=False) as content:
        return [(name, content[name]) for name in content.files if name in names]


def _of_csv(path: Path, classes: Sequence[str]) -> NDArray[np.float64]:
    return _in_order(path, _csv_rows(path, set(classes)), classes)


def _csv_rows(path: Path, names: Collection[str]) -> list[tuple[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    header = bool(lines) and lines[0][0] not in names and not all(map(_is_number, lines[0][1:]))
    return [(line[0], line[1:]) for line in lines[header:] if line[0] in names]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _of_parquet(path: Path, classes: Sequence[str]) -> NDArray[np.float64]:
    return _in_order(path, _parquet_rows(path, set(classes)), classes)


def _parquet_rows(path: Path, names: Collection[str]) -> list[tuple[str, Any]]:
    import pyarrow.parquet

    first, *values = pyarrow.parquet.read_table(path).to_pydict().values()
    return [(str(name), row) for name, *row in zip(first, *values, strict=True) if str(name) in names]


def _in_order(path: Path, rows: Sequence[tuple[str, Any]], classes: Sequence[str]) -> NDArray[np.float64]:
    """The rows of named classes, in the order of the classes."""
    named = dict(rows)
    missing = [name for name in classes if name not in named]
    if missing:
        raise KdxError(
            f"The class embeddings {path} lack {', '.join(map(repr, missing[:5]))}.", "Name every class of the data, or of the models file."
        )
    if len(named) != len(rows):
        twice = next(name for place, (name, _) in enumerate(rows) if name in dict(rows[:place]))
        raise KdxError(f"The class embeddings {path} have {twice!r} twice.", "Give one row per class.")
    if len({len(row) for row in named.values()}) > 1:
        raise KdxError(f"The class embeddings {path} have rows of different lengths.", "Give as many numbers for every class.")
    return _numbers(np.array([np.asarray(named[name], dtype=np.float64) for name in classes]))


def _numbers(rows: NDArray[Any]) -> NDArray[np.float64]:
    return np.ascontiguousarray(rows, dtype=np.float64)
