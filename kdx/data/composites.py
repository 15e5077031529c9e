"""Draws composites: a shape filled with a real texture, on a real photograph, with the exact mask of the shape.

The pictures come from scikit-image and scikit-learn, which contain them as files. Nothing is downloaded. `kdx.data.sources.composites`
makes a data set of these images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.data.labelled_images import SPLITS
from kdx.errors import KdxError, missing_package

ClassKind = Literal["texture", "shape"]
CLASS_KINDS: tuple[ClassKind, ...] = get_args(ClassKind)
"""What names the class of an image: the texture or the shape of its object. The other one is random."""

_SCIKIT_IMAGE, _SCIKIT_LEARN = ("skimage", "data"), ("sklearn", "datasets/images")

TEXTURES = {
    "brick": (*_SCIKIT_IMAGE, "brick.png"),
    "grass": (*_SCIKIT_IMAGE, "grass.png"),
    "gravel": (*_SCIKIT_IMAGE, "gravel.png"),
    "coins": (*_SCIKIT_IMAGE, "coins.png"),
    "tissue": (*_SCIKIT_IMAGE, "ihc.png"),
    "print": (*_SCIKIT_IMAGE, "page.png"),
}
"""The textures of objects: package, folder and file of each."""

PHOTOGRAPHS = {
    "china": (*_SCIKIT_LEARN, "china.jpg"),
    "flower": (*_SCIKIT_LEARN, "flower.jpg"),
    "astronaut": (*_SCIKIT_IMAGE, "astronaut.png"),
    "coffee": (*_SCIKIT_IMAGE, "coffee.png"),
    "rocket": (*_SCIKIT_IMAGE, "rocket.jpg"),
    "motorcycle": (*_SCIKIT_IMAGE, "motorcycle_left.png"),
}
"""The backgrounds. The spurious cue of class k is the k-th of them."""

_CLUTTER = {"cat": (*_SCIKIT_IMAGE, "chelsea.png"), "camera": (*_SCIKIT_IMAGE, "camera.png")}
"""The photographs that fill distractors."""

SHAPES = ("disc", "square", "triangle", "star", "cross", "ring")
"""The shapes of objects. Their areas differ by at most 16%."""

SIDES = (64, 224)
"""The smallest and the largest side of an image, in pixels."""

_PARTS = {"train": (0.0, 0.5), "validation": (0.5, 0.7), "test": (0.7, 1.0)}
"""The part of the width of every picture from which the crops of a split are cut."""

_BACKGROUND_CROP = (72, 96)
_TEXTURE_CROP = (56, 72)
"""The smallest and the largest side of a crop, in pixels of the picture. They do not depend on the side of the image."""

_DISTRACTOR_SIZE = (0.5, 0.8)
"""The diameter of a distractor relative to the mean diameter of objects."""


@dataclass(frozen=True)
class CompositeOptions:
    """What a set of composites contains.

    classes: what names the class, ``texture`` or ``shape``. side: the height and width of the images in pixels. count: the number of
    images in the three splits together. spurious: the share of the training images whose background is the photograph of their class;
    the photographs of all others are drawn uniformly. clutter: the number of distractors per image. scale: the mean diameter of an
    object relative to the side; diameters vary by 15% around it. seed: what everything random depends on.
    """

    classes: ClassKind = "texture"
    side: int = 64
    count: int = 2000
    spurious: float = 0.0
    clutter: int = 2
    scale: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = SIDES
        checks = {
            "classes": (self.classes in CLASS_KINDS, f"Choose {' or '.join(CLASS_KINDS)}."),
            "side": (low <= self.side <= high, f"Give a number of pixels from {low} to {high}."),
            "count": (100 <= self.count <= 1_000_000, "Give a number of images from 100 to 1000000."),
            "spurious": (0 <= self.spurious <= 1, "Give a share from 0 to 1."),
            "clutter": (0 <= self.clutter <= 8, "Give a number of distractors from 0 to 8."),
            "scale": (0.2 <= self.scale <= 0.8, "Give a share of the side from 0.2 to 0.8."),
            "seed": (self.seed >= 0, "Give 0 or more."),
        }
        for name, (is_valid, hint) in checks.items():
            if not is_valid:
                raise KdxError(f"The option {name} of composites cannot be {getattr(self, name)!r}.", hint)


@dataclass(frozen=True)
class Scene:
    """Everything that is random in an image. object_mask: [side, side], True exactly at the pixels of the object."""

    label: int
    photograph: str
    texture: str
    shape: str
    background: NDArray[np.uint8]
    object_mask: NDArray[np.bool_]
    object_pixels: NDArray[np.uint8]

    @property
    def image(self) -> NDArray[np.uint8]:
        """The image [side, side, 3]: the object on the background."""
        return np.where(self.object_mask[:, :, None], self.object_pixels, self.background)


def compose(options: CompositeOptions, split: str, row: int) -> Scene:
    """Image ``row`` of a split: a photograph, distractors on it, and the object on top.

    The label is ``row`` modulo the number of classes, so that every split is balanced. Background, distractors, object and texture have
    separate generators, which depend only on the seed, the split and the row. So the background, with its distractors, does not depend on
    the object (its class does, if there is a spurious cue), and an image does not depend on the number of images.
    """
    place, side = SPLITS.index(split), options.side
    streams = (np.random.default_rng([options.seed, place, row, number]) for number in range(4))
    background_rng, clutter_rng, object_rng, texture_rng = streams
    label = row % len(class_names(options))
    background, photograph = _background(options, split, label, background_rng)
    for _ in range(options.clutter):
        _add_distractor(background, options, split, clutter_rng)
    other = int(object_rng.integers(len(SHAPES)))
    shape, texture = (label, other) if options.classes == "shape" else (other, label)
    diameter = options.scale * side * object_rng.uniform(0.85, 1.15)
    mask = _figure_mask(_SHAPE_TESTS[SHAPES[shape]], side, diameter, object_rng)
    name = list(TEXTURES)[texture]
    pixels = _tinted(TEXTURES[name], split, mask, texture_rng)
    return Scene(label, photograph, name, SHAPES[shape], background, mask, pixels)


def class_names(options: CompositeOptions) -> tuple[str, ...]:
    """The names of the classes."""
    return SHAPES if options.classes == "shape" else tuple(TEXTURES)


def picture_files() -> dict[str, Path]:
    """The files of all pictures by their names. Raises KdxError if scikit-image is not installed."""
    return {source[2]: _path(source) for source in (*TEXTURES.values(), *PHOTOGRAPHS.values(), *_CLUTTER.values())}


# ---- backgrounds and distractors ----


def _background(options: CompositeOptions, split: str, label: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], str]:
    names = list(PHOTOGRAPHS)
    other, has_cue = int(rng.integers(len(names))), bool(rng.random() < options.spurious)
    name = names[label if has_cue and split == "train" else other]
    crop = _crop(_picture(PHOTOGRAPHS[name]), split, int(rng.integers(*_BACKGROUND_CROP, endpoint=True)), rng)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(crop.resize((options.side, options.side), Image.Resampling.BICUBIC)), name


def _add_distractor(canvas: NDArray[np.uint8], options: CompositeOptions, split: str, rng: np.random.Generator) -> None:
    """Paint a smooth irregular figure, filled with a piece of a photograph, on ``canvas``."""
    source = list(_CLUTTER.values())[rng.integers(len(_CLUTTER))]
    phases = rng.uniform(0, 2 * np.pi, 2)
    diameter = options.scale * options.side * rng.uniform(*_DISTRACTOR_SIZE)

    def irregular(x: _Plane, y: _Plane) -> _Region:
        angle = np.arctan2(y, x)
        return np.asarray(np.hypot(x, y) < 0.7 + 0.2 * np.cos(2 * angle + phases[0]) + 0.1 * np.cos(3 * angle + phases[1]))

    mask = _figure_mask(irregular, options.side, diameter, rng)
    canvas[mask] = _tinted(source, split, mask, rng)[mask]


# ---- figures ----

_Plane = NDArray[np.float64]
_Region = NDArray[np.bool_]


def _triangle(x: _Plane, y: _Plane) -> _Region:
    return np.asarray((y < 0.5) & (np.sqrt(3) * np.abs(x) < y + 1))


def _star(x: _Plane, y: _Plane) -> _Region:
    """Five points at radius 1 with notches at radius 0.5 between them."""
    fold = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fold) % (2 * fold) - fold)  # from the nearest point; a notch is at ``fold``
    radius = np.hypot(x, y)
    edge = np.array([0.5 * np.cos(fold) - 1, 0.5 * np.sin(fold)])
    return np.asarray(edge[0] * radius * np.sin(angle) - edge[1] * (radius * np.cos(angle) - 1) > 0)


_SHAPE_TESTS: dict[str, Callable[[_Plane, _Plane], _Region]] = {
    "disc": lambda x, y: np.asarray(np.hypot(x, y) < 0.68),
    "square": lambda x, y: np.asarray(np.maximum(np.abs(x), np.abs(y)) < 0.6),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda x, y: np.asarray((np.minimum(np.abs(x), np.abs(y)) < 0.22) & (np.maximum(np.abs(x), np.abs(y)) < 0.97)),
    "ring": lambda x, y: np.asarray((np.hypot(x, y) < 0.95) & (np.hypot(x, y) > 0.66)),
}
"""Which points of the unit disc belong to each of SHAPES."""


def _figure_mask(inside: Callable[[_Plane, _Plane], _Region], side: int, diameter: float, rng: np.random.Generator) -> _Region:
    """The pixels [side, side] of a figure whose unit disc has this diameter, at a random angle and place. The disc lies in the image."""
    angle = rng.uniform(0, 2 * np.pi)
    top, left = rng.uniform(diameter / 2, side - diameter / 2, 2)
    rows, columns = np.mgrid[:side, :side] + 0.5
    y, x = (rows - top) * (2 / diameter), (columns - left) * (2 / diameter)
    turned = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return inside(*turned)


# ---- pixels ----


def _tinted(source: tuple[str, str, str], split: str, mask: _Region, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pixels [side, side, 3] that contain a piece of a picture in the bounding box of ``mask`` and 0 elsewhere.

    The piece is a random crop in one of eight orientations. Its luminance is brought to the mean and the contrast of the whole picture,
    and gets a random colour, so that neither colour nor brightness names the picture.
    """
    crop = _crop(_luminance(source), split, int(rng.integers(*_TEXTURE_CROP, endpoint=True)), rng)
    turn, mirror = int(rng.integers(4)), bool(rng.random() < 0.5)
    level, contrast, tint = rng.uniform(0.4, 0.6), rng.uniform(0.15, 0.25), rng.uniform(0.5, 1.0, 3)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    longest = max(part.stop - part.start for part in box)
    piece = np.rot90(np.asarray(crop.resize((longest, longest), Image.Resampling.BICUBIC), np.float64), turn)
    piece = (piece[:, ::-1] if mirror else piece)[: box[0].stop - box[0].start, : box[1].stop - box[1].start]
    mean, deviation = _statistics(source)
    values = (level + contrast * (piece - mean) / deviation)[:, :, None] * tint * 1.3
    pixels = np.zeros((*mask.shape, 3), np.uint8)
    pixels[box] = np.rint(255 * np.clip(values, 0, 1))
    return pixels


def _crop(picture: Image.Image, split: str, size: int, rng: np.random.Generator) -> Image.Image:
    """A random square crop of the part of a picture that belongs to a split."""
    start, end = (round(share * picture.width) for share in _PARTS[split])
    left = int(rng.integers(start, end - size, endpoint=True))
    top = int(rng.integers(0, picture.height - size, endpoint=True))
    return picture.crop((left, top, left + size, top + size))


def _path(source: tuple[str, str, str]) -> Path:
    package, folder, name = source
    specification = find_spec(package)  # the package itself is not imported, because that is slow
    if specification is None or specification.origin is None:
        raise missing_package(package, "composites", "The data set composites")
    return Path(specification.origin).parent / folder / name


@cache
def _picture(source: tuple[str, str, str]) -> Image.Image:
    with Image.open(_path(source)) as picture:
        return picture.convert("RGB")


@cache
def _luminance(source: tuple[str, str, str]) -> Image.Image:
    return _picture(source).convert("L")


@cache
def _statistics(source: tuple[str, str, str]) -> tuple[float, float]:
    values = np.asarray(_luminance(source), np.float64)
    return float(values.mean()), float(values.std())
