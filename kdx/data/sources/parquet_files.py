"""Parquet files with a column of images, read row group by row group."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdx.data.class_folders import SPLIT_NAMES, natural_key, utf8_name
from kdx.data.label_values import LABEL_COLUMNS, class_labels, class_names
from kdx.data.labelled_images import Dataset, splits_by_name
from kdx.data.numbered_names import NumberedNames
from kdx.data.place_options import COLUMNS, located_place, place_options
from kdx.disk import parse_json
from kdx.errors import KdxError, first_line
from kdx.remote import as_path, remote_errors

_FORM = "Write parquet:FILE_OR_FOLDER, and optionally ,image=COLUMN, ,label=COLUMN and ,classes=FILE."

_KEPT_BYTES = 256_000_000
"""The most bytes of the row groups in memory together, and of a single row group."""


@dataclass(frozen=True)
class _File:
    """A Parquet file. metadata: its footer. first: the number of its first row among all files."""

    path: Path
    name: str
    metadata: Any
    first: int


def open_parquet(reference: str, place: str) -> Dataset:
    """The images in a Parquet file, or in all files ``*.parquet`` below a folder, local or at a URL.

    The column ``image`` contains encoded images as binary values, or as structs with the field ``bytes``, as Hugging Face writes them. By
    default it is the only such column. The column ``label`` contains integers or names, by default the first of `LABEL_COLUMNS`.
    ``classes`` is a text file with the names that integers index; without it, those that Hugging Face stores in the file are used. Files
    whose names begin with ``train-``, ``validation-`` or ``test-`` are these splits.

    Only the footers and the labels are read when the data are opened. An image needs its row group; the row groups that were used last stay
    in memory, up to `_KEPT_BYTES`.

    Raises KdxError for files that cannot be read, for missing columns, and for row groups that are larger than `_KEPT_BYTES`.
    """
    name, options = place_options("parquet", place, COLUMNS, _FORM)
    files = _files(name)
    schema = files[0].metadata.schema.to_arrow_schema()
    image, label = _image_column(name, schema, options.get("image")), _label_column(name, schema, options.get("label"))
    largest = _largest_group(files, image)
    values = [value for file in files for value in _labels(file, label)]
    known = class_names(as_path(options["classes"]).expanduser()) if "classes" in options else _stored_names(files[0], label)
    classes, labels = class_labels(values, known, f"The column {label!r} of {name}", name)
    ids = NumberedNames([(utf8_name(file.name), file.metadata.num_rows) for file in files])
    parts = [SPLIT_NAMES.get(file.path.name.partition("-")[0].lower(), "") for file in files for _ in range(file.metadata.num_rows)]
    splits = {} if "" in parts or len(set(parts)) < 2 else splits_by_name(parts)
    groups = _RowGroups(files, image)
    note = (
        f"Images are read in any order, by row group: for one image, a group of up to {largest.rows:,} images ({largest.bytes / 1e6:,.1f} "
        f"MB) is read, and {_KEPT_BYTES / 1e6:,.0f} MB of groups are kept."
    )
    return Dataset(reference, classes, labels, ids, {file.name: file.path for file in files}, groups.image, splits, note)


def locate_parquet(place: str) -> str:
    """``place`` with absolute paths."""
    return located_place("parquet", place, _FORM)


class _RowGroups:
    """The images of files by number. It keeps the row groups that were used last. Several threads may use it."""

    def __init__(self, files: Sequence[_File], column: str) -> None:
        self._files, self._column = files, column
        counts = [[file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)] for file in files]
        self._groups = [(file, group) for file, rows in zip(files, counts, strict=True) for group in range(len(rows))]
        self._starts = np.concatenate([[0], np.cumsum([count for rows in counts for count in rows])])
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def image(self, number: int) -> Image.Image:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        value = self._values(group)[number - int(self._starts[group])].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError("the row has no image")
        return Image.open(io.BytesIO(content))

    def _values(self, group: int) -> Any:
        with self._lock:  # several threads that need a group read it once
            values = self._kept.pop(group, None)
            if values is None:
                file, place = self._groups[group]
                values = _read(file, place, self._column).combine_chunks()
                self._bytes += values.nbytes
            self._kept[group] = values
            while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.nbytes
            return values


def _read(file: _File, group: int | None, column: str) -> Any:
    """A column of a file, or of one row group of it."""
    import pyarrow.parquet

    with (
        remote_errors(file.path),  # a lost connection makes no image unreadable
        file.path.open("rb") as stream,
        pyarrow.parquet.ParquetFile(stream, metadata=file.metadata) as table,
    ):
        return (table.read(columns=[column]) if group is None else table.read_row_group(group, columns=[column]))[column]


def _labels(file: _File, column: str) -> list[object]:
    import pyarrow

    try:
        values: list[object] = _read(file, None, column).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(file.path, error) from error
    return values


def _unreadable(path: Path, error: Exception) -> KdxError:
    return KdxError(f"The Parquet file {path} cannot be read: {first_line(error)}.", "Write it again, or give another file.")


def _files(name: str) -> list[_File]:
    import pyarrow
    import pyarrow.parquet

    place = as_path(name).expanduser()
    is_folder = place.is_dir()
    paths = sorted(place.rglob("*.parquet"), key=lambda path: natural_key(path.as_posix())) if is_folder else [place]
    if not paths:
        raise KdxError(f"There are no files *.parquet in {place}.", _FORM)
    files: list[_File] = []
    for path in paths:
        try:
            with remote_errors(path), path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
                metadata = table.metadata
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(path, error) from error
        first = files[-1].first + files[-1].metadata.num_rows if files else 0
        relative = path.relative_to(place).as_posix() if is_folder else path.name
        files.append(_File(path, relative, metadata, first))
    return [file for file in files if file.metadata.num_rows] or files[:1]


def _image_column(name: str, schema: Any, requested: str | None) -> str:
    import pyarrow

    def is_binary(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    columns = [
        field.name
        for field in schema
        if is_binary(field.type) or (pyarrow.types.is_struct(field.type) and any(each.name == "bytes" for each in field.type))
    ]
    chosen = [requested] if requested is not None else columns
    if len(chosen) != 1 or chosen[0] not in columns:
        problem = f"no column {requested!r} of images" if requested is not None else f"{len(columns)} columns that may contain images"
        raise KdxError(f"{name} has {problem}.", f"Choose one with ,image=COLUMN; its columns are {', '.join(schema.names)}.")
    return str(chosen[0])


def _label_column(name: str, schema: Any, requested: str | None) -> str:
    column = requested if requested is not None else next((each for each in LABEL_COLUMNS if each in schema.names), None)
    if column not in schema.names:
        raise KdxError(
            f"{name} has no column {requested or 'label'!r} of classes.",
            f"Choose one with ,label=COLUMN; its columns are {', '.join(schema.names)}.",
        )
    return str(column)


@dataclass(frozen=True)
class _Group:
    rows: int
    bytes: int


def _largest_group(files: Sequence[_File], column: str) -> _Group:
    """The largest row group, by the bytes of its images. Raises KdxError if it is too large to be read for one image."""
    largest = _Group(0, 0)
    for file in files:
        for place in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(place)
            chunks = (group.column(number) for number in range(group.num_columns))
            size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column)
            if size > largest.bytes:
                largest = _Group(group.num_rows, size)
            if size > _KEPT_BYTES:
                raise KdxError(
                    f"A row group of {file.path} has {size / 1e6:,.0f} MB of images, all of which must be read for each image.",
                    f"Write the file with row groups of at most {_KEPT_BYTES / 1e6:,.0f} MB (row_group_size=100 in pyarrow).",
                )
    return largest


def _stored_names(file: _File, label: str) -> list[str] | None:
    """The names of the classes that Hugging Face stores in a file; None without them."""
    try:
        features = parse_json((file.metadata.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and len(set(map(str, names))) == len(names) > 1 else None
