"""Maps as colours over an image."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from kdx.maps.scaling import resized, scaled

OPACITY = 0.8


def scaled_for_display(maps: NDArray[np.floating]) -> NDArray[np.float32]:
    """Min-max scale each map for display: (x - min) / (max - min).

    Takes ``[..., h, w]`` and gives float32 in [0, 1] of the same shape. A map that is constant shows no place above another and
    becomes zero; a value that is not finite counts as zero. The strength of a map does not survive: two scaled maps compare
    places, never amounts.
    """
    values = np.nan_to_num(np.asarray(maps, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(scaled(values), dtype=np.float32)


@functools.cache
def colours() -> NDArray[np.uint8]:
    """The colour scale, uint8 ``[256, 3]``: dark violet for the lowest value to yellow for the highest."""
    from matplotlib import colormaps

    # The ends of inferno are black and near white: on a photograph they read as shadow and as glare, not as values.
    table = colormaps["inferno"](np.linspace(0.22, 0.92, 256))
    return np.asarray(np.rint(np.asarray(table)[:, :3] * 255), dtype=np.uint8)


def composite(image: NDArray[np.uint8], map_: NDArray[np.floating], opacity: float = OPACITY) -> NDArray[np.uint8]:
    """One scaled map over its image: ``out = (1 - a) image + a colour(t)`` with ``a = opacity * t``.

    ``image`` is uint8 ``[H, W, 3]``, ``map_`` is ``[h, w]`` in [0, 1] and is resized to the image; gives uint8 ``[H, W, 3]``. Where the
    map is zero the image is untouched.
    """
    value = resized(np.asarray(map_, dtype=np.float64)[None], (image.shape[0], image.shape[1]))[0]
    colour = colours()[np.rint(value * 255).astype(int)]
    alpha = opacity * value[..., None]
    return np.asarray(np.rint((1 - alpha) * image + alpha * colour), dtype=np.uint8)
