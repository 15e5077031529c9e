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

DRAFT_MARGIN = 2
"""The least ratio between the size of a draft and the size that is needed. With 1, the levels of photographs differ by up to 46 and by 3 on
average, because almost nothing is left for the antialiased resize; with 2, by up to 18 and by 1 on average. With 2, a photograph of 12
megapixels takes a quarter longer than with 1."""

Box = tuple[float, float, float, float]
"""The (left, top, right, bottom) of a part of an image."""


def draft(image: Image.Image, size: tuple[int, int], resizing: Resizing = COVER) -> Box | None:
    """Let a JPEG file that is not decoded yet be decoded at 1/8, 1/4 or 1/2 of its size: the smallest that is at least DRAFT_MARGIN times
    as large as `fit` makes it.

    The decoder then leaves out the highest frequencies of each block. An image that is less than twice DRAFT_MARGIN times as large as
    needed, or not a JPEG file, does not change. Returns the part of the decoded and upright image that shows the image, because blocks at
    its edges may be incomplete. None stands for the whole decoded image.
    """
    orientation = orientation_of(image)
    turned_by_90 = orientation in (5, 6, 7, 8)
    width, height = image.size[::-1] if turned_by_90 else image.size
    needed = tuple(DRAFT_MARGIN * side for side in scaled_size((width, height), size, resizing))
    drafted = image.draft(None, (needed[1], needed[0]) if turned_by_90 else (needed[0], needed[1]))
    return None if drafted is None else _turned_box(drafted[1], image.size, orientation)


def _turned_box(box: Box, size: tuple[int, int], orientation: object) -> Box:
    """A box that starts at the upper left corner of an image of this (width, height), after the image is turned upright."""
    (width, height), (right, bottom) = size, box[2:]
    turned: dict[object, Box] = {
        2: (width - right, 0, width, bottom),
        3: (width - right, height - bottom, width, height),
        4: (0, height - bottom, right, height),
        5: (0, 0, bottom, right),
        6: (height - bottom, 0, height, right),
        7: (height - bottom, width - right, height, width),
        8: (0, width - right, bottom, width),
    }
    return turned.get(orientation, box)


BAR = (128, 128, 128)
"""The colour of the bars of a letterbox."""


def scaled_size(own: tuple[float, float], size: tuple[int, int], resizing: Resizing) -> tuple[int, int]:
    """The (width, height) to which `fit` resizes an image of the (width, height) ``own``, before it is cropped or gets bars."""
    height, width = size
    if resizing.mode == "squash":
        return width, height
    scales = height / own[1], width / own[0]
    if resizing.mode == "letterbox":
        return max(1, min(width, round(own[0] * min(scales)))), max(1, min(height, round(own[1] * min(scales))))
    return max(width, round(own[0] * max(scales))), max(height, round(own[1] * max(scales)))


def fit(image: Image.Image, size: tuple[int, int], resizing: Resizing = COVER, box: Box | None = None) -> Image.Image:
    """An RGB or grey ``image`` brought to ``size`` = (height, width), antialiased. `kdx.choices.ResizeMode` describes the modes.

    The bars of a letterbox are grey in an RGB image and black in a grey one, which is a mask. box: the part of the image to use; all of it
    by default.
    """
    height, width = size
    filter_ = Image.Resampling[resizing.interpolation.upper()]
    scaled = scaled_size(image.size if box is None else (box[2] - box[0], box[3] - box[1]), size, resizing)
    if resizing.mode == "cover" and scaled[0] * scaled[1] > _LARGEST:
        return _cropped_first(image, size, filter_, box)
    resized = image if scaled == image.size and box is None else image.resize(scaled, filter_, box)
    if resizing.mode == "squash":
        return resized
    if resizing.mode == "letterbox":
        boxed = Image.new(image.mode, (width, height), BAR if image.mode == "RGB" else 0)
        boxed.paste(resized, ((width - scaled[0]) // 2, (height - scaled[1]) // 2))
        return boxed
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))


def _cropped_first(image: Image.Image, size: tuple[int, int], filter_: Image.Resampling, box: Box | None) -> Image.Image:
    """The middle of a very long image. Only this part is resized, so the rest takes no memory."""
    left, top, right, bottom = (0, 0, image.width, image.height) if box is None else box
    scale = max(size[1] / (right - left), size[0] / (bottom - top))
    width, height = min(right - left, size[1] / scale), min(bottom - top, size[0] / scale)
    left, top = (left + right - width) / 2, (top + bottom - height) / 2
    return image.resize((size[1], size[0]), filter_, (left, top, left + width, top + height))


def pixels_of(levels: Tensor) -> Tensor:
    """Pixels in [0, 1] float32 of levels uint8 from 0 to 255: the same bits on every device."""
    # On a GPU, PyTorch divides by a number through its rounded inverse, which gives other bits.
    return levels.float().div_(torch.full((), 255.0, device=levels.device))
