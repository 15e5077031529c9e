"""Composites of maps and images, compared with a slow formula."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import zarr
from PIL import Image

from kdx.maps import overlays
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
