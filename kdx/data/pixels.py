"""Conversions of single Pillow images: to RGB, and to a size."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as 8-bit RGB. ``image`` itself may change.

    The EXIF orientation is applied, alpha is composited over white, 16-bit levels are scaled, and palettes and CMYK are converted.
    """
    # In place, and no conversion of an image that is RGB already: both would copy the whole image.
    ImageOps.exif_transpose(image, in_place=True)
    image.load()
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


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` resized (bicubic, antialiased) so that it just covers ``size`` = (height, width), then cropped at its centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image if covering == image.size else image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))
