"""Draws maps as colours over an image: `kdx.overlay`, and the composites of the report."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.maps.scaling import at_size, resized, scaled

if TYPE_CHECKING:
    from PIL.Image import Image

OPACITY = 0.8
"""The opacity of a map over its image where the map is highest."""


def overlay(image: Array | Image, map_: Array, /, *, peak: float | None = None, opacity: float = OPACITY) -> NDArray[np.uint8]:
    """An image with a map drawn over it as colours: uint8 [H, W, 3], for matplotlib's imshow or PIL's Image.fromarray.

    With t the map at the image's size, in [-1, 1], every pixel becomes

        (1 - a) image + a colour(t),        a = opacity |t|,

    so the image shows where the map is zero. Colours of a map without negative values go from dark violet through red to yellow-orange
    at 1; those of a signed map are blue where it is negative and orange where it is positive. The strongest colours differ from black,
    white and every grey, and the two signs from each other, for readers with any colour-vision deficiency.

    image: one image, as a PIL image or an array: RGB [H, W, 3] or [3, H, W], or grey [H, W] or [1, H, W], uint8 or floating-point in
    [0, 1], NumPy or PyTorch. map_: one map [h, w], NumPy or PyTorch, such as ``result.maps[0]``; it is resized (bilinear). peak: the
    value that is drawn as 1, the same number for several images if their colours are to be comparable. By default each map has its own
    scale: from its lowest value to its peak, or by its largest absolute value if it is signed; a constant map then draws nothing. opacity:
    of the strongest colour, in [0, 1].

    Without ``peak``, colours show where a map is high and not how strong it is.

    Raises KdxError for an image of another shape or range, for a map that is not [h, w] or not finite, and for a peak or an opacity out of
    range.

    >>> import numpy as np, kdx
    >>> drawn = kdx.overlay(np.zeros((32, 48, 3), np.uint8), np.array([[0.0, 0.0], [0.0, 2.0]]))
    >>> drawn.shape, drawn[0, 0].tolist(), drawn[-1, -1].tolist()
    ((32, 48, 3), [0, 0, 0], [201, 152, 28])
    """
    pixels = picture(image)
    values = arrays.tensor(map_, "map")
    if values.ndim != 2 or 0 in values.shape or not bool(values.isfinite().all()):
        raise KdxError(
            f"The map has shape {list(values.shape)}, or values that are not finite.", "Give one map [h, w], such as result.maps[0]."
        )
    if not 0 <= opacity <= 1:  # in this form NaN fails too
        raise KdxError(f"The opacity {opacity} is not between 0 and 1.", "Give an opacity such as 0.8.")
    if peak is not None and not 0 < peak < np.inf:
        raise KdxError(f"The peak {peak} is not a positive number.", "Give the largest value of the maps that you compare, such as 0.02.")
    signed = bool((values < 0).any())
    size, maps = (pixels.shape[0], pixels.shape[1]), values.double()[None].numpy(force=True)
    drawn = at_size(maps, size, signed=signed) if peak is None else np.clip(resized(maps / peak, size), -1, 1)
    return composite(pixels, drawn[0], opacity, signed=signed)


def picture(image: Array | Image) -> NDArray[np.uint8]:
    """One image as uint8 RGB [H, W, 3]."""
    if not isinstance(image, Tensor | np.ndarray):
        if not hasattr(image, "convert"):
            raise TypeError(f"the image must be a PIL image, a NumPy array or a PyTorch tensor, not {type(image).__name__}")
        return np.asarray(image.convert("RGB"))
    values: NDArray[Any] = arrays.tensor(image, "image").numpy(force=True)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
        values = values.transpose(1, 2, 0)
    values = values[:, :, None] if values.ndim == 2 else values
    floating = values.dtype.kind == "f"
    if values.ndim != 3 or values.shape[2] not in (1, 3) or 0 in values.shape or not (floating or values.dtype == np.uint8):
        raise KdxError(
            f"The image has shape {list(image.shape)} and type {image.dtype}.",
            "Give one RGB or grey image: [H, W, 3], [3, H, W] or [H, W], uint8 or floating-point in [0, 1].",
        )
    if floating:
        if not (values.min() >= 0 and values.max() <= 1):
            raise KdxError(
                f"The pixels of the image lie between {values.min():.3g} and {values.max():.3g}.",
                "Give the image before normalisation, as uint8 or in [0, 1].",
            )
        values = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    return np.broadcast_to(values, (*values.shape[:2], 3))


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
    """The colour scale of maps in [0, 1], uint8 ``[256, 3]``: dark violet for 0 to yellow-orange for 1."""
    from matplotlib import colormaps

    # The ends of inferno are black and near white. On a photograph they would look like shadow and glare, not like values; and people
    # without blue cones do not see pale yellow on white.
    table = colormaps["inferno"](np.linspace(0.22, 0.85, 256))
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


def composite(
    image: NDArray[np.uint8],
    map_: NDArray[np.floating],
    opacity: float = OPACITY,
    *,
    signed: bool = False,
    table: NDArray[np.uint8] | None = None,
    opaque: bool = False,
) -> NDArray[np.uint8]:
    """Draw one scaled map over its image: ``out = (1 - a) image + a colour(t)`` with ``a = opacity * |t|``.

    ``image`` is uint8 ``[H, W, 3]``. ``map_`` is ``[h, w]`` in [0, 1], or in [-1, 1] if it is ``signed``, and is resized to the image.
    Returns uint8 ``[H, W, 3]``. Where the map is zero the image does not change, unless the map is ``opaque``: a is then the opacity
    everywhere. ``table``: other colours [256, 3] than kdx's, from the lowest value to the highest.
    """
    value = _resized(map_, *image.shape[:2])
    table = (diverging_colours() if signed else colours()) if table is None else table
    colour = table[np.rint((value + 1) * 127.5 if signed else value * 255).astype(int)]
    alpha = opacity * (np.ones_like(value) if opaque else np.abs(value))[..., None]
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
