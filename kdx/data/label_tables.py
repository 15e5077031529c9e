"""Labels from a CSV file, for images that are not in class folders."""

from __future__ import annotations

import csv
from pathlib import Path

from kdx.data.class_folders import SPLIT_NAMES, FolderImage, natural_key
from kdx.errors import KdxError, first_line

_COLUMNS = "Write a header line path,label (or path,label,split) and one line per image, with paths relative to the file."


def read_label_table(table: Path) -> list[FolderImage]:
    """The images that a CSV file lists in its columns ``path``, ``label`` and, if there is one, ``split``, in natural order of the paths.

    Paths are relative to the file's folder. A split is train, validation (or val, valid) or test; every image has one, or none has. Other
    columns are ignored. Raises KdxError for a file that cannot be read, for missing columns, values and images, and for an image that is
    listed twice.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise KdxError(f"The labels {table} cannot be read: {reason}.", "Give a CSV file in UTF-8.") from error
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
