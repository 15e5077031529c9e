"""Composites of maps and images, compared with a slow formula."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image

from kdx.report import overlays
from kdx.runs.schema import layer_file_names
from tests.made_runs import ODD_LAYER
from tests.report.slow_maps import slow_resize, slow_scale


def test_composites_follow_the_formula(hostile: Path) -> None:
    layer = ODD_LAYER
    name = layer_file_names(list(json.loads((hostile / "manifest.json").read_text())["configuration"]["layers"]))[layer]
    array = zarr.open_group(hostile / "maps.zarr", mode="r")[f"{layer}/residual"]
    assert isinstance(array, zarr.Array)
    image = np.asarray(Image.open(hostile / "overlays" / "00003.png").convert("RGB"))
    large = np.repeat(np.repeat(image, 3, axis=0), 3, axis=1)  # 48 pixels to 144
    value = slow_resize(slow_scale(np.asarray(array[3])[::2, ::2]), *large.shape[:2])
    expected = np.empty_like(large)
    table = overlays.colours()
    for i, j in itertools.product(*map(range, value.shape)):
        a = float(overlays.OPACITY * value[i, j])
        for c in range(3):
            expected[i, j, c] = round((1 - a) * float(large[i, j, c]) + a * float(table[round(255 * value[i, j]), c]))
    drawn = overlays.composite(large, overlays.scaled_for_display(np.asarray(array[3])[::2, ::2]))
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1
    whole = np.asarray(Image.open(hostile / "overlays" / f"00003_{name}_residual.png"))
    assert np.array_equal(whole, overlays.composite(large, overlays.scaled_for_display(np.asarray(array[3]))))


def test_scaling_keeps_zero_and_never_divides_by_zero() -> None:
    maps = np.zeros((4, 3, 5), np.float32)
    maps[1] = 7
    maps[2, 1, 2] = np.nan
    maps[3] = np.arange(15, dtype=np.float32).reshape(3, 5) * 1e-30
    out = overlays.scaled_for_display(maps)
    assert not out[:3].any()
    assert out[3].min() == 0 and out[3].max() == 1
    assert np.array_equal(overlays.composite(np.full((6, 6, 3), 9, np.uint8), out[0]), np.full((6, 6, 3), 9, np.uint8))


def test_hostile_layer_names_become_plain_file_names(hostile: Path) -> None:
    written = {path.name for path in (hostile / "overlays").glob("00000_*.png")}
    assert len(written) == 10  # two layers with five kinds of map
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,120}", name) for name in written)
    # Names that some file systems treat as equal stay different.
    assert len({name.lower() for name in layer_file_names(["a/b", "a-b", "a:b", "A-B", "..", "con", ""]).values()}) == 7


def _linear(colour: NDArray[np.uint8]) -> NDArray[np.float64]:
    part = np.asarray(colour, dtype=np.float64) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def _lab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* of linear sRGB."""
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(np.clip(xyz / [0.9505, 1.0, 1.089], 1e-6, None))
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


# Linear sRGB as it appears without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_signs_of_a_map_differ_for_every_kind_of_colour_vision(deficiency: str) -> None:
    seen = _lab(np.clip(_linear(overlays.diverging_colours()) @ DEFICIENCIES[deficiency].T, 0, 1))
    distance = np.linalg.norm(seen[:128] - seen[:127:-1], axis=1)  # -t and t for every strength t
    assert distance.min() > 40  # about 2 is just noticeable


def test_signed_composites_follow_the_formula() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    map_ = np.array([[-1.0, 0.0, 0.25], [1.0, -0.5, 0.0]])
    drawn = overlays.composite(image, map_, signed=True)
    value = slow_resize(map_, 4, 6)
    table = overlays.diverging_colours()
    for i, j in itertools.product(range(4), range(6)):
        a = overlays.OPACITY * abs(value[i, j])
        for c in range(3):
            expected = (1 - a) * float(image[i, j, c]) + a * float(table[round(127.5 * (value[i, j] + 1)), c])
            assert abs(float(drawn[i, j, c]) - expected) <= 1
    assert np.array_equal(overlays.composite(image, np.zeros((2, 2)), signed=True), image)
    scaled = overlays.symmetric_for_display(np.array([[[2.0, -4.0]], [[0.0, 0.0]], [[np.nan, 1e-9]]]))
    assert np.array_equal(scaled, np.array([[[0.5, -1.0]], [[0.0, 0.0]], [[0.0, 1.0]]], np.float32))
