"""`open_run`: a finished run as Python objects. Maps and pictures are read from disk when they are used."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from kdx.choices import GroupKind, TableFormat
from kdx.errors import KdxError
from kdx.maps.drawing import Sheet
from kdx.maps.figures import DRAWN_KINDS, Drawable, chosen_kinds, layers_sheet
from kdx.remote import as_path
from kdx.roles import SCORE_MAPS
from kdx.runs import grouped_scores, schema
from kdx.runs.image_numbers import image_number, number_names
from kdx.runs.record import RunRecord, read_run
from kdx.runs.record_table import Records as Records
from kdx.runs.score_tables import group_table, score_table

ValueT = TypeVar("ValueT")

_BLOCK = schema.MAPS_PER_CHUNK  # images whose maps are read at once


class UnknownName(KdxError, KeyError):
    """A name that a run does not have. It is a KeyError too, so that mappings work as usual."""


def open_run(folder: str | Path) -> OpenedRun:
    """Open the run that ``kdx explain`` wrote into ``folder``, which may be at a URL: its images, maps, scores and numbers.

    It reads the scores and the predictions at once, and maps and pictures when they are used. Nothing is computed and no network is
    loaded. Runs of kdx 0.1.0 open too; they have no maps that add up to a score and no numbers of maps.

    Raises KdxError if there is no run, if it is not finished or damaged, or if a newer kdx wrote it.
    """
    record = read_run(as_path(folder))
    return OpenedRun(_Reader(record), np.arange(len(record.samples.rows)))


class Named(Mapping[str, ValueT]):
    """Values by name, each made when it is used. An unknown name raises KdxError with the names that are near."""

    def __init__(self, what: str, names: Iterable[str], value: Callable[[str], ValueT]) -> None:
        self._what, self._names, self._value = what, tuple(names), value

    def __getitem__(self, name: str) -> ValueT:
        if name not in self._names:
            raise _unknown(self._what, name, self._names)
        return self._value(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<{self._what}s: {', '.join(self._names)}>"


@dataclass(frozen=True)
class _MapsOf:
    maps: NDArray[np.float32]


def _symbols(kinds: Iterable[str]) -> list[str]:
    """Kinds of map by the names that results in Python have: score maps by symbol."""
    return [SCORE_MAPS[kind].symbol if kind in SCORE_MAPS else kind for kind in kinds]


def _unknown(what: str, name: object, names: Sequence[str]) -> UnknownName:
    near = difflib.get_close_matches(str(name), names, n=4, cutoff=0.4) or names[:4]
    listed = ", ".join(near) if near else "none"
    return UnknownName(f"The run has no {what} {str(name)!r}.", f"It has {len(names)}, such as: {listed}.")


@dataclass(frozen=True)
class Prediction:
    """What one network predicts for an image: the class (index and name), its softmax probability, and whether it is the true class."""

    index: int
    name: str
    confidence: float
    right: bool


@dataclass(frozen=True)
class ImageLayer:
    """The maps and numbers of one image at one layer.

    maps: UniCAM's maps [h, w] by kind (`kdx.roles.MAPS`), at the resolution of the features and not scaled. score_maps: the signed maps
    [h, w] by symbol, as in `kdx.LayerResult`: ``score_maps["RS(S) - RS(B)"]``. They are each image's part of a sum over all images, so
    ``score_maps[symbol].sum()`` is the image's contribution to the score. numbers: the total, strength and stability of each map as
    ``KIND/NAME`` (see `OpenedRun.number`). grid: the height and width of the maps.
    """

    layer: str
    maps: Mapping[str, NDArray[np.float32]]
    score_maps: Mapping[str, NDArray[np.float32]]
    numbers: Mapping[str, float]

    @property
    def grid(self) -> tuple[int, int]:
        values = self.maps or self.score_maps
        height, width = values[next(iter(values))].shape
        return height, width


@dataclass(frozen=True)
class RunImage(Drawable):
    """One image of a run. It draws itself (`show`, `save`), over its picture if the run has one, with a row of maps per layer.

    name: as in samples.parquet. row: its row in maps.zarr. label, label_name: its class. predictions: by role. layers: an `ImageLayer` per
    layer. numbers: by name, see `OpenedRun.number`. run: the run's folder. Maps and numbers are read when they are used.
    """

    name: str
    row: int
    label: int
    label_name: str
    predictions: dict[str, Prediction]
    layers: Mapping[str, ImageLayer] = field(repr=False, compare=False)
    numbers: Mapping[str, float] = field(repr=False, compare=False)
    run: Path = field(repr=False)
    _record: RunRecord = field(repr=False, compare=False)

    @property
    def pixels(self) -> NDArray[np.uint8] | None:
        """The image as the networks receive it, [H, W, 3]; None unless it is in the run's gallery, since a run stores no other pictures."""
        if not schema.picture_path(self._record.folder, self.row).exists():
            return None
        return np.asarray(self._record.picture(self.row))

    def _count(self) -> int:
        return 1

    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        """One row per layer, so that each map is beside its image."""
        image = self.pixels if images is None else images[0]
        chosen = chosen_kinds(kinds, DRAWN_KINDS, _symbols(self._record.map_kinds))
        sheets = []
        for name, layer in self.layers.items():
            maps = {kind: _MapsOf((layer.maps if kind in layer.maps else layer.score_maps)[kind][None]) for kind in chosen}
            sheets.append(layers_sheet({name: maps}, None if image is None else [image], [0], chosen, [name]))
        names = [f"{layer} ({height} × {width})" for layer, (height, width) in ((name, self.layers[name].grid) for name in self.layers)]
        titles = [title.rpartition("\n")[2] for title in sheets[0].titles]
        return Sheet([sheet.rows[0] for sheet in sheets], titles, names)


class _Reader:
    """Reads from a run what its images share, and remembers numbers and the blocks of maps that were read last."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._numbers: dict[str, NDArray[np.float64]] = {}
        self._blocks: dict[tuple[str, str], tuple[int, NDArray[np.float32]]] = {}

    @cached_property
    def number_names(self) -> tuple[str, ...]:
        return number_names(self.record)

    def number(self, name: str) -> NDArray[np.float64]:
        """A number of all images of the run."""
        if name not in self._numbers:
            if name not in self.number_names:
                raise _unknown("number", name, self.number_names)
            self._numbers[name] = image_number(self.record, name)
        return self._numbers[name]

    def map(self, place: int, layer: str, kind: str) -> NDArray[np.float32]:
        """One map, from the block of maps around it, so that reading image after image opens each part of the file once."""
        block, key = place // _BLOCK, (layer, kind)
        known = self._blocks.get(key)
        if known is None or known[0] != block:
            rows = [int(row) for row in self.record.samples.rows[block * _BLOCK : (block + 1) * _BLOCK]]
            known = self._blocks[key] = block, self.record.maps(layer, kind, rows)
        map_: NDArray[np.float32] = known[1][place % _BLOCK].copy()
        return map_

    def image(self, place: int) -> RunImage:
        record, samples = self.record, self.record.samples
        predictions = {
            role: Prediction(
                index := int(samples.predictions[role][place]),
                record.class_name(index),
                float(samples.confidences[role][place]),
                bool(index == samples.labels[place]),
            )
            for role in record.roles
        }
        label = int(samples.labels[place])
        return RunImage(
            samples.ids[place],
            int(samples.rows[place]),
            label,
            record.class_name(label),
            predictions,
            Named("layer", record.layers, lambda layer: self._layer(place, layer)),
            Named("number", self.number_names, lambda name: float(self.number(name)[place])),
            record.folder,
            record,
        )

    def _layer(self, place: int, layer: str) -> ImageLayer:
        kinds = self.record.map_kinds
        symbols = {SCORE_MAPS[kind].symbol: kind for kind in kinds if kind in SCORE_MAPS}
        numbers = [name.removeprefix(f"{layer}/") for name in self.number_names if name.startswith(f"{layer}/")]
        return ImageLayer(
            layer,
            Named("map", [kind for kind in kinds if kind not in SCORE_MAPS], lambda kind: self.map(place, layer, kind)),
            Named("score map", symbols, lambda symbol: self.map(place, layer, symbols[symbol])),
            Named("number", numbers, lambda name: float(self.number(f"{layer}/{name}")[place])),
        )


class OpenedRun(Drawable, Sequence[RunImage]):
    """A finished run, or some of its images: a sequence of `RunImage`, in the order of samples.parquet. It draws itself (`show`, `save`).

    ``run["cat/003.jpg"]`` is the image of this name, ``run[0]`` the first one, and ``run[:10]`` a run of the first ten. `sorted` and
    `select` return runs of the same kind. Scores, layers and classes are always those of the whole run.
    """

    def __init__(self, reader: _Reader, places: NDArray[np.int64]) -> None:
        self._reader, self._record = reader, reader.record
        self._places = places  # of the images, in samples.parquet

    @property
    def folder(self) -> Path:
        return self._record.folder

    @property
    def roles(self) -> tuple[str, ...]:
        return self._record.roles

    @property
    def layers(self) -> tuple[str, ...]:
        """The student's layers."""
        return tuple(self._record.layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of map, by their names in maps.zarr (`kdx.roles.MAPS` and `kdx.roles.SCORE_MAPS`)."""
        return self._record.map_kinds

    @property
    def classes(self) -> list[str]:
        return self._record.classes

    @property
    def images(self) -> list[str]:
        """The names of the images."""
        return [self._record.samples.ids[place] for place in self._places]

    @property
    def scores(self) -> Records:
        """Every score and difference of every layer, and the accuracy of every network (its layer is None), as in scores.csv."""
        return Records(
            dict(zip(schema.SCORES_TABLE_COLUMNS, row, strict=True)) for row in schema.scores_table_rows(self._record.stored_scores)
        )

    @property
    def class_scores(self) -> Records:
        """Every score and difference of every class at every layer, as in scores_by_class.csv (`kdx.class_scores` defines them).

        A score without a value has a reason as ``missing``. Empty for a run without scores per class.
        """
        return self._grouped("classes")

    @property
    def group_scores(self) -> Records:
        """Every score and difference of every group of images (``--groups``), as in scores_by_group.csv (`kdx.group_scores`)."""
        return self._grouped("groups")

    def _grouped(self, kind: str) -> Records:
        columns = grouped_scores.grouped_columns(kind)
        return Records(dict(zip(columns, row, strict=True)) for row in grouped_scores.grouped_rows(self._record.stored_scores, kind))

    def table(self, format: TableFormat = "markdown", digits: int = 3, *, by: GroupKind | None = None) -> str:
        """The scores as a table for a paper (``csv``, ``latex`` or ``markdown``), or the numbers of the images as CSV (``images``).

        csv has every digit, and one row per number and layer, as in scores.csv. latex is a booktabs tabular. latex and markdown have one
        row per number and one column per layer, with ``digits`` decimals, and each value has its interval. images has a row per image,
        with its class, predictions and `numbers`. by: ``class`` or ``group`` for the scores of each class or group; latex and markdown
        then have a table per layer with the main scores. Raises KdxError for another format, and for a run without these scores.
        """
        if by is not None:
            return group_table(self._record, by, format, digits)
        return self.records.csv() if format == "images" else score_table(self._record, format, digits)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the numbers that every image has: see `number`."""
        return self._reader.number_names

    def number(self, name: str) -> NDArray[np.float64]:
        """One number per image [n], for example ``layer4/rs_student_minus_base/strength``.

        ``changed``: how much the student's prediction differs from the base's, in [0, 2]: the difference of the confidences where both
        predict the same class, else their sum. ``wrong``: the confidence with which the student predicts a wrong class, and minus its
        confidence where it is right. ``disagreement``: how many pairs of networks predict different classes. ``ROLE_confidence``: the
        probability of the predicted class. ``LAYER/KIND/total``: the sum of the map; for a map that adds up to a score, the image's
        contribution. ``LAYER/KIND/strength``: its mean absolute value, where 1 is the mean of all images. ``LAYER/KIND/stability``: the
        correlation of the maps from two halves of the set, NaN where it is not known.
        """
        return self._reader.number(name)[self._places]

    @property
    def records(self) -> Records:
        """One record per image: its name, class, predictions and numbers."""
        samples = self._record.samples
        columns: dict[str, Sequence[Any] | NDArray[Any]] = {
            schema.ID: self.images,
            schema.LABEL: [self._record.class_name(int(samples.labels[place])) for place in self._places],
        }
        for role in self.roles:
            classes = samples.predictions[role][self._places]
            columns[schema.prediction_column(role)] = [self._record.class_name(int(index)) for index in classes]
        columns |= {name: self.number(name).tolist() for name in self.numbers}
        return Records(dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))

    def sorted(self, by: str, *, ascending: bool = False) -> OpenedRun:
        """The images sorted by a number (`number`), the highest first. Equal ones keep their order, and NaN comes last."""
        values = self.number(by)
        order = np.argsort(np.nan_to_num(values if ascending else -values, nan=np.inf), kind="stable")
        return self._view(self._places[order])

    def select(self, images: Iterable[str] | NDArray[Any] | Callable[[RunImage], bool]) -> OpenedRun:
        """Some of the images: those of these names, where an array [n] of bools is true, or for which a function returns true."""
        if callable(images):
            return self._view(self._places[np.array([images(image) for image in self], dtype=bool)])
        if isinstance(images, np.ndarray) and images.dtype == bool:
            if images.shape != self._places.shape:
                raise ValueError(f"the mask has the shape {images.shape}, and there are {len(self)} images")
            return self._view(self._places[images])
        return self._view(np.array([self._place(name) for name in images], dtype=np.int64))

    def maps(self, layer: str, kind: str) -> NDArray[np.float32]:
        """The maps [n, h, w] of all images, of a kind by its name in maps.zarr or by its symbol."""
        if layer not in self.layers:
            raise _unknown("layer", layer, self.layers)
        name = next((name for name in self.kinds if name in SCORE_MAPS and SCORE_MAPS[name].symbol == kind), kind)
        if name not in self.kinds:
            raise _unknown("kind of map", kind, self.kinds)
        return self._record.maps(layer, name, [int(row) for row in self._record.samples.rows[self._places]])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, image: str | int) -> RunImage: ...
    @overload
    def __getitem__(self, image: slice) -> OpenedRun: ...
    def __getitem__(self, image: str | int | slice) -> RunImage | OpenedRun:
        if isinstance(image, slice):
            return self._view(self._places[image])
        return self._reader.image(self._place(image) if isinstance(image, str) else int(self._places[image]))

    def __contains__(self, image: object) -> bool:
        name = image.name if isinstance(image, RunImage) else image
        place = self._record.samples.places.get(name) if isinstance(name, str) else None
        return place is not None and place in self._places

    def __repr__(self) -> str:
        return f"<run {self.folder}: {len(self)} images, layers {', '.join(self.layers)}, {', '.join(self.roles)}>"

    def _count(self) -> int:
        return len(self)

    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        drawn = self._view(self._places[index])
        chosen = chosen_kinds(kinds, DRAWN_KINDS[:1], _symbols(self.kinds))
        layers = {layer: {kind: _MapsOf(drawn.maps(layer, kind)) for kind in chosen} for layer in self.layers}
        own = [image.pixels for image in drawn]
        pictures = [images[place] for place in index] if images else own if any(picture is not None for picture in own) else None
        return layers_sheet(layers, pictures, range(len(drawn)), chosen, drawn.images)

    def _view(self, places: NDArray[np.int64]) -> OpenedRun:
        return OpenedRun(self._reader, places)

    def _place(self, name: str) -> int:
        place = self._record.samples.places.get(name)
        if place is None or place not in self._places:
            raise _unknown("image", name, self.images)
        return place
