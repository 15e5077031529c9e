"""Labels from a CSV file, for images that are not in class folders."""

from __future__ import annotations

import csv
from pathlib import Path

from kdx.data.class_folders import SPLIT_NAMES, FolderImage, natural_key
from kdx.errors import KdxError, first_line, near_names

_COLUMNS = "Write a header line path,label (or path,label,split) and one line per image, with paths relative to the file."


def read_label_table(table: Path) -> list[FolderImage]:
    """The images that a CSV file lists in its columns ``path``, ``label`` and, if there is one, ``split``, in natural order of the paths.

    Paths are relative to the file's folder. A split is train, validation (or val, valid) or test; every image has one, or none has. Other
    columns are ignored. Raises KdxError for a file that cannot be read, for missing columns, values and images, and for an image that is
    listed twice.
    """
    columns, rows = _read(table, "labels")
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise KdxError(f"{table} has no column {missing[0]!r}.", _COLUMNS)
    images: dict[str, FolderImage] = {}
    for line, row in enumerate(rows, 2):
        name, label, split = (str(row.get(key) or "").strip() for key in ("path", "label", "split"))
        if not name or not label:
            raise KdxError(f"Entry {line} of {table} has no {'label' if name else 'path'}.", _COLUMNS)
        if ("split" in columns and split.lower() not in SPLIT_NAMES) or name in images:
            problem = "is listed twice" if name in images else f"has the split {split!r}"
            raise KdxError(f"The image {name!r} in {table} {problem}.", "List each image once, with train, validation or test if at all.")
        images[name] = FolderImage(table.parent / Path(name), label, SPLIT_NAMES[split.lower()] if "split" in columns else "")
    lost = [name for name, image in images.items() if not image.path.is_file()]
    if lost or not images:
        problem = f"lists {len(lost)} images that do not exist, first {lost[0]!r}" if lost else "lists no images"
        raise KdxError(f"{table} {problem}.", _COLUMNS)
    return [images[name] for name in sorted(images, key=natural_key)]


def read_column(table: Path, column: str | None = None) -> tuple[str, dict[str, str]]:
    """A column of a CSV file by image: its name, and the value of each image, which the column ``path`` or ``id`` names.

    By default it is the only other column. Values may be empty. Raises KdxError for a file that cannot be read, for missing columns, and
    for an image with two values.
    """
    columns, rows = _read(table, "groups")
    key = next((name for name in ("id", "path") if name in columns), None)
    others = [name for name in columns if name != key]
    if key is None:
        raise KdxError(f"{table} has no column 'id' or 'path'.", "Write a header line id,GROUP and one line per image.")
    if column is None and len(others) == 1:
        column = others[0]
    if column not in others:
        problem = f"has no column {column!r}" if column is not None else f"has {len(others)} columns beside {key!r}"
        near = near_names(column or "", others, others)
        raise KdxError(f"{table} {problem}.", f"Choose a column with --groups: {near or 'none exists'}.")
    values: dict[str, str] = {}
    for row in rows:
        name, value = (str(row.get(each) or "").strip() for each in (key, column))
        name = Path(name).as_posix()
        if values.setdefault(name, value) != value:
            raise KdxError(f"{table} has two values of {column!r} for the image {name!r}.", "Give one line per image.")
    return column, values


def _read(table: Path, what: str) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a CSV file."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            return list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise KdxError(f"The {what} {table} cannot be read: {reason}.", "Give a CSV file in UTF-8.") from error
