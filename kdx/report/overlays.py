"""Draws maps as colours over an image."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from kdx.maps.scaling import scaled

OPACITY = 0.8
"""The opacity of a map over its image where the map is highest."""


def scaled_for_display(maps: NDArray[np.floating]) -> NDArray[np.float32]:
    """Min-max scale each map for display: (x - min) / (max - min).

    Takes ``[..., h, w]`` and returns float32 in [0, 1] of the same shape. A constant map becomes zero, because it prefers no position;
    a value that is not finite counts as zero. The scaled map does not keep the strength of the map: two scaled maps compare
    positions, not amounts.
    """
    values = np.nan_to_num(np.asarray(maps, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(scaled(values), dtype=np.float32)


def symmetric_for_display(maps: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scale each signed map for display: x / max |x|, so that zero stays zero.

    Takes ``[..., h, w]`` and returns float32 in [-1, 1] of the same shape. A map of zeros stays as it is; a value that is not finite counts
    as zero. The scaled map does not keep the strength of the map.
    """
    values = np.nan_to_num(np.asarray(maps, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    highest = np.abs(values).max(axis=(-2, -1), keepdims=True, initial=0.0)
    return np.asarray(values / np.where(highest > 0, highest, 1.0), dtype=np.float32)


@functools.cache
def colours() -> NDArray[np.uint8]:
    """The colour scale of maps in [0, 1], uint8 ``[256, 3]``: dark violet for 0 to yellow for 1."""
    from matplotlib import colormaps

    # The ends of inferno are black and near white. On a photograph they would look like shadow and glare, not like values.
    table = colormaps["inferno"](np.linspace(0.22, 0.92, 256))
    return np.asarray(np.rint(np.asarray(table)[:, :3] * 255), dtype=np.uint8)


@functools.cache
def diverging_colours() -> NDArray[np.uint8]:
    """The colour scale of signed maps in [-1, 1], uint8 ``[256, 3]``: blue for -1, orange for 1. Row 127 (row 128) is close to zero.

    The hues are those of Okabe and Ito that people with any colour-vision deficiency tell apart. The scale does not pass through white:
    a map is transparent where it is zero, so a pale centre would only hide the image.
    """
    blue, sky, orange, vermilion = ((0, 114, 178), (86, 180, 233), (230, 159, 0), (213, 94, 0))
    ramp = np.linspace(0, 1, 128)[:, None]
    negative = (1 - ramp) * np.array(blue) + ramp * np.array(sky)
    positive = (1 - ramp) * np.array(orange) + ramp * np.array(vermilion)
    return np.asarray(np.rint(np.concatenate([negative, positive])), dtype=np.uint8)


def composite(image: NDArray[np.uint8], map_: NDArray[np.floating], opacity: float = OPACITY, *, signed: bool = False) -> NDArray[np.uint8]:
    """Draw one scaled map over its image: ``out = (1 - a) image + a colour(t)`` with ``a = opacity * |t|``.

    ``image`` is uint8 ``[H, W, 3]``. ``map_`` is ``[h, w]`` in [0, 1], or in [-1, 1] if it is ``signed``, and is resized to the image.
    Returns uint8 ``[H, W, 3]``. Where the map is zero the image does not change.
    """
    value = _resized(map_, *image.shape[:2])
    table, row = (diverging_colours(), (value + 1) * 127.5) if signed else (colours(), value * 255)
    colour = table[np.rint(row).astype(int)]
    alpha = opacity * np.abs(value)[..., None]
    return np.asarray(np.rint((1 - alpha) * image + alpha * colour), dtype=np.uint8)


def _resized(map_: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """The bilinear resize of `kdx.maps.scaling.resized`, for one map ``[h, w]``, in a fixed order of float64 operations.

    PyTorch's order of operations depends on the processor. Many values lie exactly between two grey levels, so the last bit decides the
    level, and the pictures of a run should be the same bytes everywhere.
    """
    values = np.asarray(map_, dtype=np.float64)
    for axis, size in enumerate((height, width)):
        count = values.shape[axis]
        position = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
        below = np.floor(position).astype(np.intp)
        weight = position - below
        weight = weight[:, None] if axis == 0 else weight
        values = (1 - weight) * np.take(values, below, axis) + weight * np.take(values, np.minimum(below + 1, count - 1), axis)
    return values
