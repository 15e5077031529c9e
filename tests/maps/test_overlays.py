"""kdx.overlay and maps at the size of the image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import kdx
from kdx.maps import overlays
from kdx.maps.class_maps import ClassMaps
from tests.colour_vision import DEFICIENCIES, seen
from tests.report.slow_maps import slow_resize


def some_maps(n: int = 3, h: int = 5, w: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, h, w)) ** 3


def class_maps(maps: np.ndarray) -> ClassMaps[np.ndarray]:
    return ClassMaps(maps, np.zeros((len(maps), 1)), np.zeros(len(maps), np.int64), np.zeros((len(maps), 2)))


def test_maps_at_size_have_a_peak_of_one_and_equal_a_slow_resize() -> None:
    maps = some_maps()
    at_size = class_maps(maps).at_size((33, 21))
    for drawn, map_ in zip(at_size, maps, strict=True):
        value = slow_resize(map_, 33, 21)
        assert np.abs(drawn - (value - value.min()) / (value.max() - value.min())).max() < 1e-12
        assert drawn.min() == 0 and drawn.max() == 1
    assert class_maps(maps).scaled((33, 21)).max((1, 2)).min() < 1  # the resize alone lowers peaks
    tensors = ClassMaps(torch.from_numpy(maps).float() * 1e-38, *3 * [torch.zeros(3)])
    assert isinstance(tensors.at_size((33, 21)), torch.Tensor) and np.abs(tensors.at_size((33, 21)).numpy() - at_size).max() < 1e-5
    assert not class_maps(np.full((1, 3, 3), 7.0)).at_size((9, 9)).any()


def test_signed_maps_at_size_keep_their_signs_and_ratios() -> None:
    maps = some_maps(seed=1) - 0.4
    at_size = kdx.Decomposition(maps, maps, None, 0.0).at_size((20, 20))
    for drawn, map_ in zip(at_size, maps, strict=True):
        value = slow_resize(map_, 20, 20)
        assert np.abs(drawn - value / np.abs(value).max()).max() < 1e-12


def test_an_overlay_follows_its_formula_for_every_kind_of_image_and_map() -> None:
    rng = np.random.default_rng(0)
    pixels, map_ = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), some_maps(1, 3, 2)[0]
    value = slow_resize(map_, 6, 8)
    value = (value - value.min()) / (value.max() - value.min())
    table = overlays.colours()
    expected = np.empty((6, 8, 3))
    for i, j in itertools.product(range(6), range(8)):
        a = 0.8 * value[i, j]
        expected[i, j] = (1 - a) * pixels[i, j].astype(float) + a * table[round(255 * value[i, j])].astype(float)
    drawn = kdx.overlay(pixels, map_)
    assert drawn.dtype == np.uint8 and np.abs(drawn - expected).max() <= 0.51
    same = (
        kdx.overlay(Image.fromarray(pixels), torch.from_numpy(map_)),
        kdx.overlay(torch.from_numpy(pixels).permute(2, 0, 1), map_ * 1e-20),
        kdx.overlay((pixels / 255).astype(np.float32), map_ + 3),
        kdx.overlay(torch.from_numpy(pixels / 255).permute(2, 0, 1).requires_grad_(), map_),
    )
    assert all(np.array_equal(drawn, other) for other in same)
    grey = pixels[:, :, 0]
    assert np.array_equal(kdx.overlay(grey, map_), kdx.overlay(np.repeat(grey[:, :, None], 3, 2), map_))
    assert np.array_equal(kdx.overlay(grey[None], map_), kdx.overlay(Image.fromarray(grey), map_))


def test_a_signed_map_has_two_colours_and_a_common_peak_makes_maps_comparable() -> None:
    grey = np.full((4, 4), 128, np.uint8)
    signed = kdx.overlay(grey, np.array([[-1.0, 0.0], [0.0, 0.5]])).astype(int)
    assert signed[0, 0, 2] > signed[0, 0, 0] and signed[3, 3, 0] > signed[3, 3, 2]  # blue, orange
    strong, weak = np.array([[0.0, 4.0]]), np.array([[0.0, 1.0]])
    assert np.array_equal(kdx.overlay(grey, strong), kdx.overlay(grey, weak))
    alone = kdx.overlay(grey, weak, peak=4.0)
    assert np.abs(kdx.overlay(grey, strong, peak=4.0).astype(int) - 128).max() > np.abs(alone.astype(int) - 128).max() > 0
    assert np.array_equal(kdx.overlay(grey, np.zeros((2, 2))), np.repeat(grey[:, :, None], 3, 2))
    assert np.array_equal(kdx.overlay(grey, strong, opacity=0), np.repeat(grey[:, :, None], 3, 2))


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_peak_of_a_map_is_visible_on_every_grey_and_the_scale_grows_lighter(deficiency: str) -> None:
    greys = np.arange(256, dtype=np.uint8)
    drawn = np.stack([kdx.overlay(np.full((1, 1), grey, np.uint8), np.array([[1.0]]), peak=1)[0, 0] for grey in greys])
    before = np.repeat(greys[:, None], 3, 1)
    assert np.linalg.norm(seen(drawn, deficiency) - seen(before, deficiency), axis=1).min() > 30
    assert (np.diff(seen(overlays.colours()[::8], deficiency)[:, 0]) > 0).all()


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_signs_of_a_map_differ_for_every_kind_of_colour_vision(deficiency: str) -> None:
    colours = seen(overlays.diverging_colours(), deficiency)
    distance = np.linalg.norm(colours[:128] - colours[:127:-1], axis=1)  # -t and t for every strength t
    assert distance.min() > 40  # about 2 is just noticeable


@pytest.mark.parametrize(
    ("image", "map_", "options", "message"),
    [
        (np.zeros((4, 4, 2)), np.ones((2, 2)), {}, r"shape \[4, 4, 2\]"),
        (np.zeros((4, 4, 3), np.int64), np.ones((2, 2)), {}, "type int64"),
        (np.full((3, 4, 4), -2.1), np.ones((2, 2)), {}, "between -2.1 and -2.1"),
        (np.full((3, 4, 4), np.nan), np.ones((2, 2)), {}, "between nan"),
        (np.zeros((4, 4)), np.ones((1, 2, 2)), {}, r"map has shape \[1, 2, 2\]"),
        (np.zeros((4, 4)), np.array([[np.nan]]), {}, "not finite"),
        (np.zeros((4, 4)), np.ones((2, 2)), {"opacity": 2}, "opacity 2"),
        (np.zeros((4, 4)), np.ones((2, 2)), {"peak": 0}, "peak 0"),
    ],
)
def test_errors(image: np.ndarray, map_: np.ndarray, options: dict[str, float], message: str) -> None:
    with pytest.raises(kdx.KdxError, match=message):
        kdx.overlay(image, map_, **options)
    with pytest.raises(TypeError, match="not str"):
        kdx.overlay("a.jpg", map_)  # type: ignore[arg-type]
