"""The gallery of a run: its images with their maps, for the page and as composites under ``overlays/``."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.disk import write_atomic
from kdx.report import overlays
from kdx.roles import MAPS, MapKind
from kdx.runs.record import RunRecord
from kdx.runs.schema import layer_file_names, overlay_path, pictured_rows

_LONGEST_EDGE = 320  # of an image on the page, in pixels

_COMPOSITE_EDGE = 112  # composites of smaller images are enlarged by an integer factor to about this size, in pixels

_MAP_EDGE = 64  # of a map on the page; larger maps are averaged down to this size

_LOSSLESS = 24_000  # an image of at most this many bytes stays PNG on the page

_PIXELATED = 96  # the page shows images up to this size with square pixels

PackedMap = tuple[int, int, str]
"""Height, width and base64 of one byte per position."""


@dataclass(frozen=True)
class Prediction:
    role: str
    class_name: str
    right: bool
    confidence: float


@dataclass(frozen=True)
class Card:
    """One image of the gallery. ``image`` is a data URI of width x height pixels."""

    id: str
    label: int
    label_name: str
    image: str
    width: int
    height: int
    predictions: list[Prediction]
    maps: list[list[PackedMap | None]]  # [layer][kind]; None where the map is constant


@dataclass(frozen=True)
class Gallery:
    """Cards in the run's order, and the kinds of map and the classes that they have."""

    cards: list[Card]
    kinds: list[MapKind]
    classes: list[tuple[int, str, int]]  # (class, name, number of cards)

    @property
    def pixelated(self) -> bool:
        """Whether every image is so small that its pixels should appear as squares."""
        return all(max(card.width, card.height) <= _PIXELATED for card in self.cards)

    @property
    def opacity(self) -> int:
        """The opacity of a map over its image, in percent."""
        return round(100 * overlays.OPACITY)

    @property
    def gradient(self) -> str:
        """The colour scale as the stops of a CSS gradient, drawn over grey as a map is drawn over an image."""
        grey = np.full((1, 1, 3), 128, np.uint8)
        steps = [overlays.composite(grey, np.full((1, 1), t))[0, 0] for t in np.linspace(0, 1, 13)]
        return ", ".join(f"rgb({r} {g} {b})" for r, g, b in steps)


def make_gallery(run: RunRecord) -> Gallery:
    """The gallery of the images that the run has pictures of. Writes their composites under ``overlays/``.

    Raises LostResult where a picture or a map is missing or damaged.
    """
    kinds = [kind for kind in MAPS.values() if kind.score in run.score_names]
    positions = {int(row): position for position, row in enumerate(run.samples.rows)}
    rows = [row for row in pictured_rows(run.folder) if row in positions]
    maps = {(layer, kind.name): overlays.scaled_for_display(run.maps(layer, kind.name, rows)) for layer in run.layers for kind in kinds}
    layer_names = layer_file_names(list(run.layers))
    cards = []
    for place, row in enumerate(rows):
        picture = run.picture(row)
        of_image = {key: stack[place] for key, stack in maps.items()}
        for (layer, kind), map_ in of_image.items():
            _write_composite(overlay_path(run.folder, row, layer_names[layer], kind), picture, map_)
        packed = [[_packed(of_image[layer, kind.name]) for kind in kinds] for layer in run.layers]
        cards.append(_card(run, positions[row], picture, packed))
    counts = Counter(card.label for card in cards)
    return Gallery(cards, kinds, [(label, run.class_name(label), count) for label, count in sorted(counts.items())])


def _card(run: RunRecord, position: int, picture: Image.Image, maps: list[list[PackedMap | None]]) -> Card:
    samples = run.samples
    label = int(samples.labels[position])
    predictions = [
        Prediction(
            role,
            run.class_name(int(samples.predictions[role][position])),
            bool(samples.correct(role)[position]),
            float(samples.confidences[role][position]),
        )
        for role in run.roles
    ]
    shown = _shrunk(picture)
    return Card(samples.ids[position], label, run.class_name(label), _data_uri(shown), *shown.size, predictions, maps)


def _write_composite(path: Path, picture: Image.Image, map_: NDArray[np.float32]) -> None:
    composite = Image.fromarray(overlays.composite(np.asarray(_enlarged(picture)), map_))
    write_atomic(path, _encoded(composite, "PNG", compress_level=1))


def _enlarged(image: Image.Image) -> Image.Image:
    """A small image with its pixels repeated, so that a smooth map over it is visible."""
    factor = math.ceil(_COMPOSITE_EDGE / max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) if factor > 1 else image


def _shrunk(image: Image.Image) -> Image.Image:
    if max(image.size) <= _LONGEST_EDGE:
        return image
    small = image.copy()
    small.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE), Image.Resampling.LANCZOS)
    return small


def _encoded(image: Image.Image, format_: str, **options: int | bool) -> bytes:
    out = io.BytesIO()
    image.save(out, format=format_, **options)
    return out.getvalue()


def _data_uri(image: Image.Image) -> str:
    """The image as PNG where that is small, else as PNG or JPEG, whichever is smaller."""
    data, kind = _encoded(image, "PNG", optimize=True), "png"
    if len(data) > _LOSSLESS:
        jpeg = _encoded(image, "JPEG", quality=86)
        if len(jpeg) < len(data):
            data, kind = jpeg, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _packed(map_: NDArray[np.float32]) -> PackedMap | None:
    """A map that is scaled for display, as the page's script reads it; None where it is zero everywhere."""
    if not map_.any():
        return None
    height, width = map_.shape
    if max(height, width) > _MAP_EDGE:
        shrink = _MAP_EDGE / max(height, width)
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        map_ = np.asarray(Image.fromarray(map_).resize(size, Image.Resampling.BOX))
        height, width = map_.shape
    quantised = np.rint(np.clip(map_, 0, 1) * 255).astype(np.uint8)
    return height, width, base64.b64encode(quantised.tobytes()).decode("ascii")
