"""Generated images with exact masks of a cue that names the class and that one network can be trained to know and another not to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Cue = Literal["colour", "texture", "place", "shape"]
CUES: tuple[Cue, ...] = get_args(Cue)
"""The kinds of cue."""

CLASSES = 6
SIDE = 32
BOX = 12
"""The side of the images, and of the two boxes in each of them, in pixels."""

_NOISE = 0.06
_DARK, _BRIGHT = 0.15, 0.85

_GLYPHS = (
    ".####.#....##....##....##....#.####.",  # O
    "#....#.#..#...##....##...#..#.#....#",  # X
    "######..##....##....##....##....##..",  # T
    "#.....#.....#.....#.....#.....######",  # L
    "######....#....#....#....#....######",  # Z
    "#....##....########....##....##....#",  # H
)
"""The glyph of each class: 6 x 6 cells of 2 x 2 pixels, row by row."""


@dataclass(frozen=True)
class Composites:
    """n images with two parts, each of which may name the class: a glyph, and a cue of one kind.

    images: float32 [n, 3, SIDE, SIDE] in [0, 1]. labels: the classes [n], from 0 to CLASSES - 1. cues: the class that each image's cue
    names [n]; it is drawn for images without a cue too. planted, common: masks [n, SIDE, SIDE], True in the box of the cue and in the
    box of the glyph. No pixel outside ``planted`` depends on the cue, and no pixel outside ``common`` depends on the glyph. A mask is
    False everywhere if the image lacks that part. The two masks of an image do not overlap.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    cues: NDArray[np.int64]
    planted: NDArray[np.bool_]
    common: NDArray[np.bool_]


def draw_composites(
    kind: Cue, count: int, seed: int, *, informative: bool = True, without_glyph: float = 0.0, without_cue: float = 0.0
) -> Composites:
    """Draw images for planting a difference between two networks.

    Each image has a grey background, and two boxes of BOX x BOX pixels at random places, one in the left half and one in the right half;
    which half has which box is random. Independent noise is added to all pixels. One box contains the glyph of the class in bright
    strokes. The other box contains a cue of this kind, which names a class:

    - ``colour``: a uniform colour, whose hue is the class's; its brightness is random.
    - ``texture``: a grey grating with a period of 4 pixels, whose orientation is the class's; its phase is random.
    - ``place``: a dark box with one bright cell of 4 x 6 pixels; which of the six cells is bright is the class.
    - ``shape``: a dark box with a bright figure: square, disc, diamond, triangle, cross or ring.

    A network trained on images with ``informative=False`` learns the glyph alone, because the cue's class is then drawn independently of
    the label. A network trained on images with an informative cue, some of which lack the glyph, learns the cue as well. The cue is then
    a difference between the two networks that was planted at known places.

    kind: one of CUES. count: the number of images. seed: the same arguments give the same images. informative: whether the cue names the
    image's own class. without_glyph, without_cue: the expected shares of images that lack the glyph and the cue; no image lacks both.

    Two calls with the same count and seed draw the same labels, places, background and noise, whatever the other arguments are. So they
    differ only inside the masks. Labels are uniform and independent; classes are not exactly balanced.

    The masks are boxes; single pixels inside them can be equal for all classes. The masks do not state what a trained network uses;
    measure that with images that lack one of the parts.

    Raises ValueError for an unknown kind, a count below 1, and shares that are negative or whose sum is above 1.

    >>> drawn = draw_composites("colour", 8, seed=0)
    >>> drawn.images.shape, bool((drawn.cues == drawn.labels).all()), int(drawn.planted[0].sum())
    ((8, 3, 32, 32), True, 144)
    """
    if kind not in CUES:
        raise ValueError(f"kind must be one of {CUES}, not {kind!r}")
    if count < 1:
        raise ValueError("count must be 1 or more")
    if min(without_glyph, without_cue) < 0 or without_glyph + without_cue > 1:
        raise ValueError("without_glyph and without_cue must be at least 0, and their sum at most 1")
    rng = np.random.default_rng(seed)  # everything is drawn in every call and in this order, so that calls differ only inside the masks
    labels, random_cues = rng.integers(CLASSES, size=(2, count))
    part = rng.random(count)
    cue_on_left = rng.integers(2, size=count)
    rows = rng.integers(SIDE - BOX + 1, size=(2, count))
    columns = rng.integers(SIDE // 2 - BOX + 1, size=(2, count))
    variation = rng.random(count)
    levels = rng.uniform(0.35, 0.65, size=count).astype(np.float32)
    noise = _NOISE * rng.standard_normal((count, 3, SIDE, SIDE), dtype=np.float32)

    cues = labels if informative else random_cues
    has_glyph, has_cue = part >= without_glyph, part < 1 - without_cue
    columns = columns + SIDE // 2 * np.stack([1 - cue_on_left, cue_on_left])
    images = np.broadcast_to(levels[:, None, None, None], noise.shape).copy()
    planted, common = np.zeros((2, count, SIDE, SIDE), dtype=bool)
    strokes = _glyphs()
    for i in range(count):
        if has_cue[i]:
            box = _box(rows[0, i], columns[0, i])
            images[i, :, *box] = _cue(kind, int(cues[i]), float(variation[i]))
            planted[i][box] = True
        if has_glyph[i]:
            box = _box(rows[1, i], columns[1, i])
            images[i, :, *box] = np.where(strokes[labels[i]], _BRIGHT, images[i, :, *box])
            common[i][box] = True
    return Composites(np.clip(images + noise, 0, 1), labels, cues.copy(), planted, common)


def _box(row: int, column: int) -> tuple[slice, slice]:
    return slice(row, row + BOX), slice(column, column + BOX)


def _glyphs() -> NDArray[np.bool_]:
    """The strokes of all classes [CLASSES, BOX, BOX]."""
    cells = np.array([[character == "#" for character in glyph] for glyph in _GLYPHS]).reshape(CLASSES, 6, 6)
    strokes: NDArray[np.bool_] = cells.repeat(BOX // 6, axis=1).repeat(BOX // 6, axis=2)
    return strokes


def _cue(kind: Cue, number: int, variation: float) -> NDArray[np.float64]:
    """The pixels [3 or 1, BOX, BOX] of the cue of class ``number``. variation: what varies within a class, in [0, 1)."""
    y, x = np.mgrid[:BOX, :BOX] - (BOX - 1) / 2
    match kind:
        case "colour":
            return np.broadcast_to(_colour(number / CLASSES)[:, None, None] * (0.6 + 0.4 * variation), (3, BOX, BOX))
        case "texture":
            angle = np.pi * number / CLASSES
            phase = 2 * np.pi * (variation + (x * np.cos(angle) + y * np.sin(angle)) / 4)
            return np.asarray(0.5 + 0.4 * np.sin(phase))[None]
        case "place":
            cells = np.arange(CLASSES).reshape(3, 2).repeat(BOX // 3, axis=0).repeat(BOX // 2, axis=1)
            return np.where(cells == number, _BRIGHT, _DARK)[None]
        case "shape":
            return np.where(_figures(y, x)[number], _BRIGHT, _DARK)[None]


def _colour(hue: float) -> NDArray[np.float64]:
    """Red, green and blue of a saturated hue in [0, 1), where 0 is red."""
    ramp = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return np.asarray(0.1 + 0.8 * np.clip(ramp, 0, 1))


def _figures(y: NDArray[np.float64], x: NDArray[np.float64]) -> list[NDArray[np.bool_]]:
    """Square, disc, diamond, triangle, cross and ring in coordinates whose origin is the centre of the box."""
    radius, half = np.hypot(x, y), BOX / 2
    return [
        np.ones(x.shape, dtype=bool),
        radius < half - 1,
        np.abs(x) + np.abs(y) < half,
        np.abs(x) < (y + half) / 2,
        np.minimum(np.abs(x), np.abs(y)) < 2,
        (radius < half) & (radius > 3),
    ]
