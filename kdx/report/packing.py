"""Images and maps as text that a page can contain."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LONGEST_EDGE = 320  # of an image on the page, in pixels

_MAP_EDGE = 64  # of a map on the page; larger maps are averaged down to this size

_LOSSLESS = 24_000  # an image of at most this many bytes stays PNG on the page

_ZERO = 127  # the byte of zero in a signed map

PackedMap = tuple[int, int, str, float, float]
"""Height, width, base64 of one byte q per position, offset and step: the value at a position is offset + step * q."""


def packed_map(map_: NDArray[np.floating], *, signed: bool, edge: int = _MAP_EDGE) -> PackedMap | None:
    """A map [h, w] as the page's script reads it; None where it is zero everywhere.

    A map with a longer edge than ``edge`` is averaged down to it. A value that is not finite counts as
    zero. The bytes of a signed map are symmetric, so that zero is exactly byte 127.
    """
    values = np.nan_to_num(np.asarray(map_, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if not values.any():
        return None
    values = _averaged(values, edge)
    low, high = (-float(np.abs(values).max()), float(np.abs(values).max())) if signed else (float(values.min()), float(values.max()))
    step = high / _ZERO if signed else (high - low) / 255
    levels = np.rint((values - low) / step) if step > 0 else np.zeros_like(values)
    text = base64.b64encode(levels.astype(np.uint8).tobytes()).decode("ascii")
    return (*values.shape, text, rounded(low), rounded(step))


def _averaged(values: NDArray[np.float32], edge: int) -> NDArray[np.float32]:
    height, width = values.shape
    if max(height, width) <= edge:
        return values
    shrink = edge / max(height, width)
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))


def rounded(value: float) -> float:
    """A number with five significant digits, which is short in JSON."""
    return float(f"{value:.5g}")


def rounded_or_none(value: float) -> float | None:
    """The same of a number that may not be finite, which JSON does not have."""
    return rounded(value) if math.isfinite(value) else None


def shrunk(image: Image.Image) -> Image.Image:
    if max(image.size) <= _LONGEST_EDGE:
        return image
    small = image.copy()
    small.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE), Image.Resampling.LANCZOS)
    return small


def encoded(image: Image.Image, format_: str, **options: int | bool) -> bytes:
    out = io.BytesIO()
    image.save(out, format=format_, **options)
    return out.getvalue()


def data_uri(image: Image.Image) -> str:
    """The image as PNG where that is small, else as PNG or JPEG, whichever is smaller."""
    data, kind = encoded(image, "PNG", optimize=True), "png"
    if len(data) > _LOSSLESS:
        jpeg = encoded(image, "JPEG", quality=86)
        if len(jpeg) < len(data):
            data, kind = jpeg, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
