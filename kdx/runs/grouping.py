"""The groups of a run's images: a column of a table that the user names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.class_folders import natural_key
from kdx.data.dataset import Dataset, table_of
from kdx.data.label_tables import read_column
from kdx.errors import KdxError
from kdx.runs.schema import StoredGrouping

MAX_GROUPS = 200
"""The most groups for which scores are computed, and by default the most classes."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """column: the name of the column. names: its values in natural order. codes [N]: for each image of the data set the place of its value
    among them, or -1 where it has none and belongs to no group. identity: what the results depend on."""

    column: str
    names: tuple[str, ...]
    codes: NDArray[np.int64]
    identity: StoredGrouping

    def members(self, indices: NDArray[np.int64]) -> list[Tensor]:
        """For each group, the places of its images in ``indices``, which are rows of the data set."""
        return [torch.from_numpy(np.flatnonzero(self.codes[indices] == code)) for code in range(len(self.names))]


def grouping_of(dataset: Dataset, explained: NDArray[np.int64], column: str | None, file: Path | None) -> Grouping | None:
    """The groups by a column of the data's own table, or of a file with the columns ``id`` (or ``path``) and ``column``; None for neither.

    Raises KdxError for data without a table, for a file that has none of the explained images, and for more than MAX_GROUPS groups.
    """
    if column is None and file is None:
        return None
    table = table_of(dataset.reference) if file is None else file.expanduser()
    if table is None:
        raise KdxError(
            f"{dataset.reference} has no table with a column {column!r}.",
            "Give the data as a CSV file, or give --groups-file FILE.csv with the columns id and the group.",
        )
    column, values = read_column(table, column)
    labels = [values.get(name, "") for name in dataset.ids]
    names = _names([labels[index] for index in explained], column, table)
    places = {name: place for place, name in enumerate(names)}
    digest = hashlib.sha256(json.dumps([[dataset.ids[index], labels[index]] for index in explained]).encode()).hexdigest()
    codes = np.array([places.get(label, -1) for label in labels], dtype=np.int64)
    return Grouping(column, names, codes, {"column": column, "sha256": digest})


def _names(labels: Sequence[str], column: str, table: Path) -> tuple[str, ...]:
    names = tuple(sorted({label for label in labels if label}, key=natural_key))
    if not names:
        raise KdxError(
            f"No image that is explained has a value of {column!r} in {table}.",
            "Name the images as samples.parquet does, relative to the data.",
        )
    if len(names) > MAX_GROUPS:
        raise KdxError(f"The column {column!r} of {table} has {len(names):,} values.", f"Choose a column with at most {MAX_GROUPS} values.")
    return names
