"""Conversions of single Pillow images to RGB and to a size, and of levels to pixels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from kdx.choices import COVER, Resizing

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
    turn = _TURNS.get(orientation_of(image))
    if turn is not None:
        image = image.transpose(turn)
        # The result is upright, so it must not state an orientation, which EXIF and XMP data do: a later call would turn it again.
        image.info = {name: value for name, value in image.info.items() if name == "transparency"}
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


def turned(image: Image.Image, orientation: object) -> Image.Image:
    """``image`` turned upright from an EXIF orientation."""
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def orientation_of(image: Image.Image) -> object:
    """The value of the orientation in the EXIF data; 1 (upright) if it cannot be read.

    `PIL.ImageOps.exif_transpose` also writes all EXIF data again, which fails if any entry is damaged.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises SyntaxError, struct.error, ValueError and more on damaged data
        return 1


_LARGEST = 50_000_000
"""The most pixels of a resized image before it is cropped. An image of 1 x 60,000 pixels would have 3 billion at 224 x 224."""

BAR = (128, 128, 128)
"""The colour of the bars of a letterbox."""


def fit(image: Image.Image, size: tuple[int, int], resizing: Resizing = COVER) -> Image.Image:
    """An RGB or grey ``image`` brought to ``size`` = (height, width), antialiased. `kdx.choices.ResizeMode` describes the modes.

    The bars of a letterbox are grey in an RGB image and black in a grey one, which is a mask.
    """
    height, width = size
    filter_ = Image.Resampling[resizing.interpolation.upper()]
    if resizing.mode == "squash":
        return image if image.size == (width, height) else image.resize((width, height), filter_)
    scales = height / image.height, width / image.width
    if resizing.mode == "letterbox":
        inside = max(1, min(width, round(image.width * min(scales)))), max(1, min(height, round(image.height * min(scales))))
        boxed = Image.new(image.mode, (width, height), BAR if image.mode == "RGB" else 0)
        boxed.paste(image if inside == image.size else image.resize(inside, filter_), ((width - inside[0]) // 2, (height - inside[1]) // 2))
        return boxed
    covering = (max(width, round(image.width * max(scales))), max(height, round(image.height * max(scales))))
    if covering[0] * covering[1] > _LARGEST:  # of a very long image, only what is shown is resized
        scale, (left, top) = max(scales), ((covering[0] - width) / 2, (covering[1] - height) / 2)
        box = (left / scale, top / scale, min(image.width, (left + width) / scale), min(image.height, (top + height) / scale))
        return image.resize((width, height), filter_, box=box)
    resized = image if covering == image.size else image.resize(covering, filter_)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))


def pixels_of(levels: Tensor) -> Tensor:
    """Pixels in [0, 1] float32 of levels uint8 from 0 to 255: the same bits on every device."""
    # On a GPU, PyTorch divides by a number through its rounded inverse, which gives other bits.
    return levels.float().div_(torch.full((), 255.0, device=levels.device))
