"""Data sets that the ``datasets`` library of Hugging Face reads: from its Hub, or from local files in its formats."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from kdx.data.class_folders import SPLIT_NAMES, utf8_name
from kdx.data.fingerprint import SourceFile
from kdx.data.label_values import LABEL_COLUMNS, class_labels
from kdx.data.labelled_images import Dataset, Indices, splits_by_name
from kdx.data.numbered_names import NumberedNames
from kdx.data.place_options import place_options
from kdx.errors import KdxError, first_line, import_optional

_FORM = "Write hfdata:NAME_OR_FOLDER, and optionally ,split=train or ,config=NAME, ,image=COLUMN and ,label=COLUMN."


@dataclass(frozen=True)
class _Place:
    """What follows ``hfdata:`` in a reference: a name or a path, and options."""

    name: str
    split: str | None = None
    image: str | None = None
    label: str | None = None
    config: str | None = None

    @classmethod
    def parse(cls, place: str) -> _Place:
        name, options = place_options("hfdata", place, {field.name for field in fields(cls)} - {"name"}, _FORM)
        return cls(name, **options)

    @property
    def path(self) -> Path:
        """The local path that the name may be."""
        return Path(self.name).expanduser()


def locate(place: str) -> str:
    """``place`` with the absolute path of a local folder or file. The name of a data set of the Hub stays as it is."""
    parsed = _Place.parse(place)
    return str(parsed.path.resolve()) + place.removeprefix(parsed.name) if parsed.path.exists() else place


def open_hugging_face(reference: str, place: str) -> Dataset:
    """A data set of the Hub by its name, or local data: a folder of ``save_to_disk``, Parquet files, an image folder, or WebDataset shards
    (``.tar``), in a folder, or a single ``.parquet`` or ``.tar`` file.

    Images are read one by one from the Arrow files that ``datasets`` maps into memory; kdx copies none of them. ``datasets`` itself writes
    these files into its cache for all formats except ``save_to_disk``. Images are decoded by kdx, so that damaged ones are left out
    as those in folders are. The classes are the names of the column of type ClassLabel, or the different values of the column of labels.
    Published splits train, validation and test are kept. ``split`` chooses one split, ``image`` and ``label`` columns.

    Raises KdxError if the package is missing, if ``datasets`` cannot load the data, and for splits and columns that do not exist.
    """
    parsed = _Place.parse(place)
    library = import_optional("datasets", "hfdata", f"The data set {reference}")
    try:
        parts = _load(library, parsed)
    except KdxError:
        raise
    except Exception as error:  # the library and its file formats raise many types
        raise KdxError(
            f"The data set {parsed.name} cannot be loaded: {first_line(error)}.",
            "Check the name or the path; a data set of the Hub needs a connection, or must be in the cache already.",
        ) from error
    parts, note = _chosen(parsed, parts)
    if not any(map(len, parts.values())):
        raise KdxError(f"The data set {parsed.name} has no rows.", "Choose another split with ,split=NAME.")
    first = next(iter(parts.values()))
    image, label = _image_column(parsed, library, first.features), _label_column(parsed, library, first.features)
    classes, labels = _labels(parsed, library, list(parts.values()), label)
    columns = [_column(parsed, part, image) for part in parts.values()]
    try:
        images = [column.cast_column(image, library.Image(decode=False)) for column in columns]
    except Exception as error:
        raise KdxError(
            f"The column {image!r} of {parsed.name} does not contain images: {first_line(error)}.", "Name another column."
        ) from error
    rows = [(part, row) for part in images for row in range(len(part))]

    def read(index: int) -> Image.Image:
        part, row = rows[index]
        entry = part[row][image]
        content = None if entry is None else entry["bytes"]
        if content is None and not (entry and entry["path"]):
            raise ValueError("the row has no image")
        return Image.open(entry["path"] if content is None else io.BytesIO(content))

    ids = NumberedNames([(name, len(part)) for name, part in parts.items()])
    return Dataset(reference, classes, labels, ids, _files(parsed, parts), read, _splits(parts), note)


def _load(library: Any, place: _Place) -> dict[str, Any]:
    """The parts of a data set by their names."""
    path = place.path
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        loaded = library.load_from_disk(str(path))
        return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    if path.is_file():
        kinds = {".parquet": "parquet", ".tar": "webdataset"}
        if path.suffix not in kinds:
            raise KdxError(f"{path} is not a file that hfdata reads.", "Give a .parquet or .tar file, a folder, or a name of the Hub.")
        return dict(library.load_dataset(kinds[path.suffix], data_files=str(path.resolve())))
    return dict(library.load_dataset(str(path.resolve()) if path.is_dir() else place.name, name=place.config))


def _chosen(place: _Place, parts: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The parts to read, and a note about those that are left out."""
    if place.split is not None:
        if place.split not in parts:
            raise KdxError(f"{place.name} has no split {place.split!r}.", f"Its splits are {', '.join(parts)}.")
        return {place.split: parts[place.split]}, ""
    known = {name: part for name, part in parts.items() if name.lower() in SPLIT_NAMES and len(part)} or parts
    names = ", ".join(sorted(parts.keys() - known.keys()))
    return known, f"Splits left out: {names}." if names else ""


def _image_column(place: _Place, library: Any, features: Mapping[str, Any]) -> str:
    if place.image is not None:
        return _existing(place, "image", place.image, features)
    columns = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    if len(columns) != 1:
        problem = f"several columns of images: {', '.join(columns)}" if columns else "no column of type Image"
        raise KdxError(f"{place.name} has {problem}.", f"Choose one with ,image=COLUMN; its columns are {', '.join(features)}.")
    return columns[0]


def _label_column(place: _Place, library: Any, features: Mapping[str, Any]) -> str:
    if place.label is not None:
        return _existing(place, "label", place.label, features)
    typed = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    columns = typed or [name for name in LABEL_COLUMNS if name in features][:1]
    if len(columns) != 1:
        problem = f"several columns of classes: {', '.join(columns)}" if columns else "no column of classes"
        raise KdxError(f"{place.name} has {problem}.", f"Choose one with ,label=COLUMN; its columns are {', '.join(features)}.")
    return columns[0]


def _existing(place: _Place, kind: str, column: str, features: Mapping[str, Any]) -> str:
    if column not in features:
        raise KdxError(f"{place.name} has no column {column!r} for ,{kind}=.", f"Its columns are {', '.join(features)}.")
    return column


def _column(place: _Place, part: Any, column: str) -> Any:
    """A part with one column. Raises KdxError for a damaged one: Arrow itself would read at any place in memory that the file states."""
    selected = part.select_columns([column])
    try:
        selected.data.validate(full=True)  # reads where the values begin and end, but not the images
    except Exception as error:
        raise KdxError(
            f"The column {column!r} of {place.name} is damaged: {first_line(error)}.", "Write or download the data again."
        ) from error
    return selected


def _labels(place: _Place, library: Any, parts: Sequence[Any], column: str) -> tuple[tuple[str, ...], Indices]:
    """The names of the classes, and the labels [n] of all parts."""
    values = [value for part in parts for value in _column(place, part, column).with_format("arrow")[:][column].to_pylist()]
    feature = parts[0].features[column]
    names = feature.names if isinstance(feature, library.ClassLabel) else None
    return class_labels(values, names, f"The column {column!r} of {place.name}", place.name)


def _splits(parts: Mapping[str, Any]) -> dict[str, Indices]:
    """The indices of the published splits; none if there is only one part, or a part that is not such a split."""
    names = [SPLIT_NAMES.get(name.lower(), "") for name, part in parts.items() for _ in range(len(part))]
    return {} if len(parts) < 2 or "" in names else splits_by_name(names)


def _files(place: _Place, parts: Mapping[str, Any]) -> dict[str, SourceFile]:
    """The files that identify the data: the local ones, or those in the cache."""
    if place.path.is_file():
        return {place.path.name: place.path}
    if place.path.is_dir():
        paths = sorted(path for path in place.path.rglob("*") if path.is_file() and not path.name.startswith((".", "cache-")))
        return {utf8_name(path.relative_to(place.path).as_posix()): path for path in paths}
    return {Path(file["filename"]).name: Path(file["filename"]) for part in parts.values() for file in part.cache_files}
