"""The same images with the maps of several students, on one scale of colours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from kdx.report.comparison import Comparison
from kdx.report.gallery import PIXELATED, MapFigures, is_stable, map_figures, scale_end
from kdx.report.kinds import PageKind, opening_layer, page_kinds, shown_first
from kdx.report.packing import PackedMap, data_uri, packed_map, packed_shape, shrunk
from kdx.runs.gallery_choice import read_choice
from kdx.runs.record import RunRecord

_MOST_IMAGES = 60

_FEWEST_IMAGES = 6

_PAGE_BYTES = 24_000_000
"""About how many bytes of maps the page has. With many students it shows fewer images."""

_STRIP_IMAGES, _STRIP_STUDENTS = 6, 3
"""The images at the top of the page, and how many students' maps they have there."""

_WITHOUT_STUDENT = ("rs_base", "rs_teacher", "fss_base")
"""Kinds of map that do not depend on the student."""


@dataclass(frozen=True)
class StudentPrediction:
    """The class that a student predicts for an image."""

    student: str
    class_name: str
    right: bool
    confidence: float


@dataclass(frozen=True)
class ComparedImage:
    """One image. image: a data URI of width x height pixels. predictions: one per student, in order.

    maps, figures [layer][kind][student]: None where the map is zero everywhere, and where the student does not have the layer.
    """

    id: str
    label: int
    label_name: str
    image: str
    width: int
    height: int
    predictions: list[StudentPrediction]
    maps: list[list[list[PackedMap | None]]]
    figures: list[list[list[MapFigures | None]]]


@dataclass(frozen=True)
class ComparedGallery:
    """The images of the page.

    limits [layer][kind]: where the scale of colours ends, common to all students. opening: the number of the layer that the page shows
    first. grid: the height and width of the first student's maps there.
    """

    images: list[ComparedImage]
    kinds: list[PageKind]
    opening: int
    grid: tuple[int, int]
    first_kind: PageKind
    limits: list[list[float]]
    classes: list[tuple[int, str, int]]  # (class, name, number of images)

    @property
    def pixelated(self) -> bool:
        """Whether every image is so small that its pixels should appear as squares."""
        return all(max(image.width, image.height) <= PIXELATED for image in self.images)

    @property
    def strip_students(self) -> int:
        """How many students, from the first one on, have maps in the strip."""
        return _STRIP_STUDENTS

    @property
    def strip(self) -> list[int]:
        """The images at the top of the page: those on which the sums of the shown students' maps differ most, at the opening layer.

        Images with an empty map, or one whose stability is known to be low, are left out.
        """
        kind = self.kinds.index(self.first_kind)
        differences: dict[int, float] = {}
        for place, image in enumerate(self.images):
            maps = image.maps[self.opening][kind][:_STRIP_STUDENTS]
            figures = [known for known in image.figures[self.opening][kind][:_STRIP_STUDENTS] if known is not None]
            if None not in maps and all(map(is_stable, figures)):
                sums = [total for total, _, _ in figures]
                differences[place] = max(sums) - min(sums)
        return sorted(differences, key=lambda place: (-differences[place], place))[:_STRIP_IMAGES]


def make_compared_gallery(comparison: Comparison) -> ComparedGallery:
    """The gallery of the common images that at least one run has a picture of.

    Raises KdxError where the runs have no kind of map in common, and LostResult where a picture or a map is missing or damaged.
    """
    runs = list(comparison.runs.values())
    known = [{kind.name for kind in page_kinds(run)} for run in runs]
    kinds = [kind for kind in page_kinds(comparison.first) if all(kind.name in names for names in known)]
    kinds = [kind for kind in kinds if kind.name not in _WITHOUT_STUDENT]
    pictures = _pictured(comparison, _most_images(comparison, kinds))
    places = [[run.samples.places[name] for name in pictures] for run in runs]
    stacks: dict[tuple[str, str, int], NDArray[np.float32]] = {}
    figures: dict[tuple[str, str, int], list[MapFigures]] = {}
    layers = list(comparison.layers)
    for (layer, names), kind in product(comparison.layers.items(), kinds):
        for student, (run, own) in enumerate(zip(runs, names, strict=True)):
            if own is not None:
                key = layer, kind.name, student
                stacks[key] = run.maps(own, kind.name, run.samples.rows[places[student]].tolist())
                figures[key] = map_figures(run.map_columns(own, kind.name), stacks[key], places[student])
    images = []
    for at, (name, (owner, row)) in enumerate(pictures.items()):
        picture = shrunk(runs[owner].picture(row))
        label = int(comparison.first.samples.labels[comparison.first.samples.places[name]])
        keys = [[[(layer, kind.name, place) for place in range(len(runs))] for kind in kinds] for layer in layers]
        images.append(
            ComparedImage(
                name,
                label,
                comparison.first.class_name(label),
                data_uri(picture),
                *picture.size,
                [_prediction(comparison, student, name) for student in comparison.names],
                [
                    [
                        [packed_map(stacks[key][at], signed=kind.signed) if key in stacks else None for key in of_kind]
                        for of_kind, kind in zip(of_layer, kinds, strict=True)
                    ]
                    for of_layer in keys
                ],
                [[[figures[key][at] if key in figures else None for key in of_kind] for of_kind in of_layer] for of_layer in keys],
            )
        )
    limits = [
        [scale_end(stacks[key] for place in range(len(runs)) if (key := (layer, kind.name, place)) in stacks) for kind in kinds]
        for layer in layers
    ]
    counts = Counter(image.label for image in images)
    classes = [(label, comparison.first.class_name(label), count) for label, count in sorted(counts.items())]
    shown = shown_first(comparison.first, kinds)
    opening = _opening(comparison, kinds)
    grid = _grid(comparison.first, comparison.layers[opening][0] or opening, kinds[0])
    return ComparedGallery(images, kinds, layers.index(opening), grid, shown[0] if shown else kinds[0], limits, classes)


def _pictured(comparison: Comparison, most: int) -> dict[str, tuple[int, int]]:
    """At most this many of the common images that a run has a picture of, evenly spaced: a run that has it, and its row there."""
    known: dict[str, tuple[int, int]] = {}
    for place, run in enumerate(comparison.runs.values()):
        names = dict(zip((int(row) for row in run.samples.rows), run.samples.ids, strict=True))
        known = {names[row]: (place, row) for row in read_choice(run)[1] if row in names} | known
    pictured = [name for name in comparison.images if name in known]
    chosen = np.linspace(0, len(pictured) - 1, min(most, len(pictured))).round().astype(int)
    return {pictured[at]: known[pictured[at]] for at in chosen}


def _most_images(comparison: Comparison, kinds: list[PageKind]) -> int:
    """How many images the page shows, so that it does not become too large."""
    runs = list(comparison.runs.values())
    cells = 0
    for layer_names in comparison.layers.values():
        for run, own in zip(runs, layer_names, strict=True):
            if own is not None:
                height, width = packed_shape(*_grid(run, own, kinds[0]))
                cells += height * width
    return min(_MOST_IMAGES, max(_FEWEST_IMAGES, _PAGE_BYTES // (len(kinds) * cells * 4 // 3)))


def _grid(run: RunRecord, layer: str, kind: PageKind) -> tuple[int, int]:
    """The height and width of the maps of a kind."""
    _, height, width = run.maps(layer, kind.name, [int(run.samples.rows[0])]).shape
    return height, width


def _prediction(comparison: Comparison, student: str, image: str) -> StudentPrediction:
    run = comparison.runs[student]
    place = run.samples.places[image]
    predicted = int(run.samples.predictions["student"][place])
    confidence = float(run.samples.confidences["student"][place])
    return StudentPrediction(student, run.class_name(predicted), bool(run.samples.correct("student")[place]), confidence)


def _opening(comparison: Comparison, kinds: list[PageKind]) -> str:
    """The layer at which the first run's page opens, if all runs have it, else the last common one."""
    complete = [layer for layer, own in comparison.layers.items() if None not in own]
    own = {names[0]: layer for layer, names in comparison.layers.items() if layer in complete}
    grids = {layer: _grid(comparison.first, layer, kinds[0]) for layer in comparison.first.layers}
    return own.get(opening_layer(comparison.first, kinds[0], grids), complete[-1])
