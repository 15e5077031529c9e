"""A map over its image, in the colours of OpenCV."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError

_COLOUR_MAPS = {
    0: "autumn",
    1: "bone",
    2: "jet",
    3: "winter",
    6: "summer",
    7: "spring",
    8: "cool",
    13: "magma",
    14: "inferno",
    15: "plasma",
    16: "viridis",
    17: "cividis",
    18: "twilight",
    19: "twilight_shifted",
    20: "turbo",
}
"""OpenCV's numbers of the colour maps that it shares with Matplotlib, up to 2 of 255 levels, and of its jet."""


def show_cam_on_image(
    img: NDArray[Any],
    mask: NDArray[Any],
    use_rgb: bool = False,
    colormap: int | str = "jet",
    image_weight: float = 0.5,
) -> NDArray[np.uint8]:
    """A map over its image: ``(1 - image_weight) colour(mask) + image_weight img``, divided by its largest value, as uint8 [h, w, 3].

    img: [h, w, 3] in [0, 1]. mask: [h, w] in [0, 1], as the methods of this module return it for one image. use_rgb: whether the colours
    are red, green, blue, as in an RGB image; False is OpenCV's order. colormap: the name of a colour map of Matplotlib, or OpenCV's number
    of a map that Matplotlib has too; jet is OpenCV's. image_weight: in [0, 1].

    Because of the division, the brightness of two pictures cannot be compared.

    Raises KdxError for an image or mask of another shape or outside [0, 1], an unknown colour map, and a weight outside [0, 1].
    """
    image, values = np.asarray(img, dtype=np.float64), np.asarray(mask, dtype=np.float64)
    if image.ndim != 3 or image.shape[2] != 3 or values.shape != image.shape[:2]:
        raise KdxError(
            f"The image has shape {list(image.shape)}, and the mask {list(values.shape)}.", "Give an image [h, w, 3] and a mask [h, w]."
        )
    for name, pixels in (("image", image), ("mask", values)):
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # in this form NaN fails too
            raise KdxError(f"The {name} has values outside [0, 1].", "Divide 8-bit images by 255, and scale maps to [0, 1].")
    if not 0 <= image_weight <= 1:
        raise KdxError(f"The weight {image_weight} of the image is not between 0 and 1.", "Give a weight such as 0.5.")
    heat = _colours(colormap)[(255 * values).astype(np.uint8)]
    blend = (1 - image_weight) * (heat if use_rgb else heat[:, :, ::-1]) + image_weight * image
    return np.asarray(255 * blend / (blend.max() or 1), dtype=np.uint8)


def _colours(name: int | str) -> NDArray[np.float64]:
    """The colours [256, 3] of a colour map: red, green and blue in [0, 1]."""
    from matplotlib import colormaps

    position = np.linspace(0, 1, 256)
    colour_map = _COLOUR_MAPS.get(name, "") if isinstance(name, int) else name
    if colour_map == "jet":  # Matplotlib's jet has other slopes
        return np.asarray(np.clip(1.5 - np.abs(4 * position[:, None] - np.array([3, 2, 1])), 0, 1))
    if colour_map not in colormaps:
        raise KdxError(f"There is no colour map {name!r}.", "Name one of Matplotlib, such as jet or viridis.")
    return np.asarray(colormaps[colour_map](position))[:, :3]
