"""The gallery of a run: its images with their maps, for the page and as composites under ``overlays/``."""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.disk import write_atomic
from kdx.maps import overlays
from kdx.report.kinds import PageKind, opening_layer, page_kinds, shown_first
from kdx.report.packing import PackedMap, data_uri, encoded, packed_map, rounded, rounded_or_none, shrunk
from kdx.runs.evaluation import number_name, read_evaluation
from kdx.runs.gallery_choice import BALANCED, read_choice
from kdx.runs.image_numbers import CHANGED, DISAGREEMENT, WRONG, prediction_numbers
from kdx.runs.measured import MapColumns
from kdx.runs.record import RunRecord
from kdx.runs.schema import layer_file_names, overlay_path

_COMPOSITE_EDGE = 112  # composites of smaller images are enlarged by an integer factor to about this size, in pixels

PIXELATED = 96
"""A page shows images up to this size, in pixels, with square pixels."""

_SATURATION = 0.95  # the common scale of a layer ends at this quantile of the highest absolute values of its maps

_STRIP_HIGHEST, _STRIP_LOWEST = 4, 2  # the images of the strip: those with the highest sums, then those with the lowest

LEAST_STABILITY = 0.5
"""The stability that a map of a strip has at least, where stability is known."""

CONFIDENCE = "confidence"
"""The number of a card that is the student's confidence in its prediction."""

_SORTED_BY = {
    CHANGED: "Change of the prediction",
    WRONG: "Student’s confidence in a wrong class",
    DISAGREEMENT: "Disagreement of predictions",
    CONFIDENCE: "Student’s confidence",
}
"""The numbers of a card by which the page sorts, in words."""

MAP_SCRIPTS = ("maps.js", "tiles.js", "zoom.js")
"""The scripts of every page that shows maps over images: drawing a map, the tiles of an image, and the dialog that shows it large."""

MapFigures = tuple[float, float | None, float | None]
"""The sum of a map over its positions, its strength and its stability (`kdx.runs.record.MapColumns`)."""


@dataclass(frozen=True)
class Prediction:
    role: str
    class_name: str
    right: bool
    confidence: float


@dataclass(frozen=True)
class Card:
    """One image of the gallery. ``image`` is a data URI of width x height pixels. ``numbers``: those of
    `kdx.runs.image_numbers.MEANINGS`, by name, and ``confidence``, the student's.
    """

    id: str
    label: int
    label_name: str
    image: str
    width: int
    height: int
    predictions: list[Prediction]
    numbers: dict[str, float]
    maps: list[list[PackedMap | None]]  # [layer][kind]; None where the map is zero everywhere
    figures: list[list[MapFigures]]


@dataclass(frozen=True)
class Gallery:
    """Cards in the run's order, with the kinds of map and the classes that they have.

    grids: the height and width of the first kind of map per layer. opening: the layer that the page shows first. limits [layer][kind]: the
    absolute value at which the layer's common scale ends. strip: the cards in the strip. chosen: how the images were
    chosen, as a sentence. ordered: whether the cards have another order than the data. inside [layer][kind]: the share of each card's map
    that lies inside the image's mask, None where it was not evaluated; empty for a run without such an evaluation.
    """

    cards: list[Card]
    kinds: list[PageKind]
    shown: list[PageKind]
    grids: dict[str, tuple[int, int]]
    opening: str
    limits: list[list[float]]
    classes: list[tuple[int, str, int]]  # (class, name, number of cards)
    chosen: str
    ordered: bool
    inside: list[list[list[float | None] | None]]

    @property
    def pixelated(self) -> bool:
        """Whether every image is so small that its pixels should appear as squares."""
        return all(max(card.width, card.height) <= PIXELATED for card in self.cards)

    @property
    def numbers(self) -> dict[str, str]:
        """The numbers of a card by which the page sorts, in words; `CHANGED` only where there is a network to compare with."""
        return {name: label for name, label in _SORTED_BY.items() if self.cards and name in self.cards[0].numbers}

    @property
    def opacity(self) -> int:
        """The opacity of a map over its image, in percent."""
        return round(100 * overlays.OPACITY)

    @property
    def strip(self) -> list[int]:
        """The cards of the strip at the opening layer: the highest sums of the first kind of map, then the lowest if it is signed.

        Empty maps, and maps whose stability is known to be low, are left out.
        """
        layer, signed = list(self.grids).index(self.opening), self.kinds[0].signed
        figures = {place: card.figures[layer][0] for place, card in enumerate(self.cards) if card.maps[layer][0] is not None}
        sums = {place: of_map[0] for place, of_map in figures.items() if is_stable(of_map)}
        order = sorted(sums, key=lambda place: (-sums[place], place))
        count = _STRIP_HIGHEST + _STRIP_LOWEST
        if len(order) <= count or not signed:
            return order[:count]
        return [*order[:_STRIP_HIGHEST], *order[-_STRIP_LOWEST:]]


def is_stable(figures: MapFigures) -> bool:
    """Whether a map may be in a strip: its stability is high enough, or not known."""
    stability = figures[2]
    return stability is None or stability >= LEAST_STABILITY


def colour_tables() -> dict[str, str]:
    """The two scales of colours for the page's script, as base64 of one row of red, green and blue per level."""
    tables = {"sequential": overlays.colours(), "diverging": overlays.diverging_colours()}
    return {name: base64.b64encode(table.tobytes()).decode("ascii") for name, table in tables.items()}


def gradient(signed: bool) -> str:
    """The colour scale as the stops of a CSS gradient, drawn over grey as a map is drawn over an image."""
    grey = np.full((1, 1, 3), 128, np.uint8)
    values = np.linspace(-1 if signed else 0, 1, 13)
    steps = [overlays.composite(grey, np.full((1, 1), t), signed=signed)[0, 0] for t in values]
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in steps)


def make_gallery(run: RunRecord) -> Gallery:
    """The gallery of the images that the run has pictures of. Writes their composites under ``overlays/``.

    Raises LostResult where a picture or a map is missing or damaged.
    """
    kinds = page_kinds(run)
    positions = {int(row): position for position, row in enumerate(run.samples.rows)}
    choice, chosen = read_choice(run)
    rows = [row for row in chosen if row in positions]
    places = [positions[row] for row in rows]
    maps = {(layer, kind.name): run.maps(layer, kind.name, rows) for layer in run.layers for kind in kinds}
    numbers = {**prediction_numbers(run.samples), CONFIDENCE: run.samples.confidences["student"]}
    figures = {key: map_figures(run.map_columns(*key), stack, places) for key, stack in maps.items()}

    def make_card(place: int) -> Card:
        picture = run.picture(rows[place])
        of_image = {key: stack[place] for key, stack in maps.items()}
        _write_composites(run, rows[place], picture, of_image, kinds)
        packed = [[packed_map(of_image[layer, kind.name], signed=kind.signed) for kind in kinds] for layer in run.layers]
        of_card = {name: rounded(float(values[places[place]])) for name, values in numbers.items()}
        return _card(
            run, places[place], picture, of_card, packed, [[figures[layer, kind.name][place] for kind in kinds] for layer in run.layers]
        )

    with ThreadPoolExecutor() as pool:  # most of the time goes to zlib, which releases the interpreter's lock
        cards = list(pool.map(make_card, range(len(rows))))
    counts = Counter(card.label for card in cards)
    grids = {layer: _grid(maps[layer, kinds[0].name]) for layer in run.layers}
    return Gallery(
        cards,
        kinds,
        shown_first(run, kinds),
        grids,
        opening_layer(run, kinds[0], grids),
        [[scale_end([maps[layer, kind.name]]) for kind in kinds] for layer in run.layers],
        [(label, run.class_name(label), count) for label, count in sorted(counts.items())],
        choice.description(len(cards)),
        choice.order != BALANCED or bool(choice.images),
        _inside(run, kinds, places),
    )


def _inside(run: RunRecord, kinds: Sequence[PageKind], places: Sequence[int]) -> list[list[list[float | None] | None]]:
    """`Gallery.inside` of these images, from what `kdx evaluate` measured."""
    evaluation = read_evaluation(run)
    values = {} if evaluation is None else evaluation.values
    names = [[number_name(layer, kind.name, "energy") for kind in kinds] for layer in run.layers]
    if not any(name in values for row in names for name in row):
        return []
    of_cards = {name: [rounded_or_none(float(x)) for x in shares[list(places)]] for name, shares in values.items()}
    return [[of_cards.get(name) for name in row] for row in names]


def _grid(maps: NDArray[np.float32]) -> tuple[int, int]:
    return int(maps.shape[1]), int(maps.shape[2])


def map_figures(columns: MapColumns | None, maps: NDArray[np.float32], places: Sequence[int]) -> list[MapFigures]:
    """The figures of the gallery's maps. A run of an older version stored none; the sum is then that of the map itself."""
    if columns is None:
        return [(rounded(float(total)), None, None) for total in np.nan_to_num(maps.astype(np.float64)).sum((1, 2))]
    return [
        (
            rounded(float(np.nan_to_num(columns.total[place]))),
            rounded_or_none(float(columns.strength[place])),
            rounded_or_none(float(columns.stability[place])),
        )
        for place in places
    ]


def scale_end(stacks: Iterable[NDArray[np.float32]]) -> float:
    """The absolute value at which the common scale of these maps, several arrays [n, h, w], ends.

    Higher values have the same colour, so that a single map does not dim all others.
    """
    highest = np.concatenate(
        [np.abs(np.nan_to_num(maps.astype(np.float64), posinf=0.0, neginf=0.0)).max((1, 2), initial=0.0) for maps in stacks]
    )
    highest = highest[highest > 0]
    return rounded(float(np.quantile(highest, _SATURATION))) if len(highest) else 1.0


def _card(
    run: RunRecord,
    position: int,
    picture: Image.Image,
    numbers: dict[str, float],
    maps: list[list[PackedMap | None]],
    figures: list[list[MapFigures]],
) -> Card:
    samples = run.samples
    label = int(samples.labels[position])
    classes = [int(samples.predictions[role][position]) for role in run.roles]
    predictions = [
        Prediction(role, run.class_name(class_), bool(samples.correct(role)[position]), float(samples.confidences[role][position]))
        for role, class_ in zip(run.roles, classes, strict=True)
    ]
    shown = shrunk(picture)
    name = samples.ids[position]
    return Card(name, label, run.class_name(label), data_uri(shown), *shown.size, predictions, numbers, maps, figures)


def _write_composites(
    run: RunRecord, row: int, picture: Image.Image, maps: Mapping[tuple[str, str], NDArray[np.float32]], kinds: Sequence[PageKind]
) -> None:
    names = layer_file_names(list(run.layers))
    large = np.asarray(_enlarged(picture))
    for layer in run.layers:
        for kind in drawn_kinds(kinds):
            scale = overlays.symmetric_for_display if kind.signed else overlays.scaled_for_display
            drawn = overlays.composite(large, scale(maps[layer, kind.name]), signed=kind.signed)
            # Run lengths alone: on composites of photographs it is faster than zlib's first level, and the files are smaller.
            data = encoded(Image.fromarray(drawn), "PNG", compress_level=1, compress_type=zlib.Z_RLE)
            write_atomic(overlay_path(run.folder, row, names[layer], kind.name), data)


def drawn_kinds(kinds: Sequence[PageKind]) -> list[PageKind]:
    """The kinds whose composites are written: UniCAM's and the page's first. The page itself draws the others from their values."""
    return [kind for kind in kinds if kind is kinds[0] or not kind.signed]


def _enlarged(image: Image.Image) -> Image.Image:
    """A small image with its pixels repeated, so that a smooth map over it is visible."""
    factor = math.ceil(_COMPOSITE_EDGE / max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) if factor > 1 else image
