"""The gallery: the images and maps that the page embeds."""

from __future__ import annotations

import numpy as np
from PIL import Image

from kdx.report import gallery


def test_large_maps_and_images_are_shrunk() -> None:
    rng = np.random.default_rng(0)
    packed = gallery._packed(rng.random((130, 65)).astype(np.float32))
    assert packed is not None and packed[:2] == (64, 32)
    photo = Image.fromarray(rng.integers(0, 255, (400, 700, 3), dtype=np.uint8))
    assert gallery._shrunk(photo).size == (320, 183)
    assert gallery._data_uri(gallery._shrunk(photo)).startswith("data:image/jpeg")
    assert gallery._data_uri(photo.crop((0, 0, 32, 32))).startswith("data:image/png")
