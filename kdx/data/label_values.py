"""Classes and labels from the values of a column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdx.data.class_folders import natural_key
from kdx.data.labelled_images import Indices
from kdx.errors import KdxError

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")
"""The names of columns that may contain the classes, in the order of preference."""


def class_labels(values: Sequence[object], names: Sequence[str] | None, column: str, data: str) -> tuple[tuple[str, ...], Indices]:
    """The names of the classes, and the label [n] of each value: an integer or a name.

    names: the classes that integers index; without them, the different values are the classes, in natural order. column, data: the names
    of the column and the data, for errors. Raises KdxError for values of other types, for values without a class, and for names that are
    not different texts.
    """
    numbers: dict[object, int]
    if names is not None and (not all(isinstance(name, str) for name in names) or len(set(names)) < len(names)):
        raise KdxError(f"The classes of {data} do not have different names.", "Choose another column with ,label=COLUMN.")
    if names is not None and not any(isinstance(value, list | dict) for value in values):
        numbers = {**{name: number for number, name in enumerate(names)}, **{number: number for number in range(len(names))}}
    elif all(type(value) is int or isinstance(value, str) for value in values):
        different = sorted(set(values), key=lambda value: natural_key(str(value)))
        names, numbers = [str(value) for value in different], {value: number for number, value in enumerate(different)}
    else:
        raise KdxError(f"{column} contains neither integers nor names.", "Choose another column with ,label=COLUMN.")
    unlabelled = sum(value not in numbers for value in values)
    if unlabelled:
        raise KdxError(
            f"{unlabelled} of {len(values)} images of {data} have no class.",
            "Choose a split whose images have classes (,split=train), or name all classes.",
        )
    return tuple(names), np.array([numbers[value] for value in values], dtype=np.int64)


def class_names(file: Path) -> list[str]:
    """The names of classes in a text file: one per line, in the order of their numbers. Raises KdxError for a file without two names."""
    try:
        names = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise KdxError(f"The class names {file} cannot be read.", "Give a text file in UTF-8 with one name per line.") from error
    if len(set(names)) < len(names) or len(names) < 2:
        raise KdxError(f"{file} does not contain two or more different names.", "Give a text file in UTF-8 with one name per line.")
    return names
