"""Conversions of single Pillow images: to RGB, and to a size."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by its EXIF orientation."""


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as 8-bit RGB. ``image`` itself may change.

    The first frame of an animation is taken. The EXIF orientation is applied, and nothing else of the EXIF data is read, so that damage
    there does not matter. Alpha is composited over white, 16-bit levels are scaled, and palettes and CMYK are converted.
    """
    # An image that is upright or RGB already is not converted, because that would copy it.
    image.load()
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        levels = np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255)  # 65535 / 257 = 255
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    elif image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.rint(np.clip(levels * (255 if levels.max() <= 1 else 1), 0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> object:
    """The value of the orientation in the EXIF data; 1 (upright) if it cannot be read.

    `PIL.ImageOps.exif_transpose` also writes all EXIF data again, which fails if any entry is damaged.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises SyntaxError, struct.error, ValueError and more on damaged data
        return 1


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` resized (bicubic, antialiased) so that it just covers ``size`` = (height, width), then cropped at its centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image if covering == image.size else image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))
