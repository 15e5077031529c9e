"""Images and maps as text in the page."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from PIL import Image

from kdx.report import packing


def test_large_maps_and_images_are_shrunk() -> None:
    rng = np.random.default_rng(0)
    packed = packing.packed_map(rng.random((130, 65)).astype(np.float32), signed=False)
    assert packed is not None and packed[:2] == (64, 32)
    photo = Image.fromarray(rng.integers(0, 255, (400, 700, 3), dtype=np.uint8))
    assert packing.shrunk(photo).size == (320, 183)
    assert packing.data_uri(packing.shrunk(photo)).startswith("data:image/jpeg")
    assert packing.data_uri(photo.crop((0, 0, 32, 32))).startswith("data:image/png")


@pytest.mark.parametrize("signed", [True, False])
def test_a_packed_map_has_the_values_within_half_a_step(signed: bool) -> None:
    rng = np.random.default_rng(1)
    for scale in (1.0, 1e-7, 1e5):
        map_ = scale * (rng.normal(size=(5, 3)) if signed else rng.random((5, 3)))
        map_[2, 1] = 0
        packed = packing.packed_map(map_, signed=signed)
        assert packed is not None
        height, width, text, offset, step = packed
        values = offset + step * np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width)
        assert np.abs(values - map_).max() <= 0.51 * step + 1e-4 * scale
        if signed:
            assert abs(values[2, 1]) <= 1e-4 * np.abs(map_).max()  # zero is a byte of its own
            assert -127 * step == pytest.approx(offset, rel=1e-4)


def test_an_empty_map_and_a_constant_map() -> None:
    assert packing.packed_map(np.zeros((2, 2)), signed=True) is None
    assert packing.packed_map(np.array([[np.nan, 0.0]]), signed=False) is None
    packed = packing.packed_map(np.full((2, 2), 3.0), signed=False)
    assert packed is not None and packed[3:] == (3.0, 0.0)
