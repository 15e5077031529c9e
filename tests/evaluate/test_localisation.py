"""Localisation against its definitions, position by position."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kdx.evaluate.candidates import at_image_size, positive
from kdx.evaluate.localisation import THRESHOLDS, density, energy, iou_curves, pointing
from tests import oracle


@pytest.fixture
def maps() -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.random((6, 9, 7)).astype(np.float32) ** 3
    values[1, 2, 3] = values[1, 5, 5] = 2  # two highest positions
    values[2] = 0.5
    return np.asarray(values / values.max((1, 2), keepdims=True))


@pytest.fixture
def masks() -> np.ndarray:
    masks = np.random.default_rng(1).random((6, 9, 7)) < 0.3
    masks[1] = False
    masks[1, 2, 3] = masks[1, 2, 4] = True
    masks[3] = True
    return masks


def test_energy_and_density(maps: np.ndarray, masks: np.ndarray) -> None:
    for map_, mask, share, ratio in zip(maps, masks, energy(maps, masks), density(maps, masks), strict=True):
        positions = [(float(map_[y, x]), bool(mask[y, x])) for y in range(9) for x in range(7)]
        inside, total = sum(value for value, marked in positions if marked), sum(value for value, _ in positions)
        assert share == pytest.approx(inside / total, abs=1e-6)
        assert ratio == pytest.approx(inside / mask.sum() / (total / 63), abs=1e-5)
    assert energy(maps, masks)[2] == pytest.approx(masks[2].mean())  # a uniform map
    assert energy(maps, masks)[3] == density(maps, masks)[3] == 1  # a mask of the whole image


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1.5, 3.0])
def test_pointing_game(maps: np.ndarray, masks: np.ndarray, tolerance: float) -> None:
    for map_, mask, value in zip(maps, masks, pointing(maps, masks, tolerance), strict=True):
        marked = np.argwhere(mask)
        peaks = np.argwhere(map_ == map_.max())
        hits = [min(math.dist(peak, position) for position in marked) <= tolerance for peak in peaks]
        assert value == sum(hits) / len(hits)
    assert pointing(maps, masks)[1] == 0.5 and pointing(maps, masks)[2] == pytest.approx(masks[2].mean())
    assert (pointing(maps, np.zeros_like(masks), tolerance) == 0).all()


def test_iou(maps: np.ndarray, masks: np.ndarray) -> None:
    curves = iou_curves(maps, masks)
    for map_, mask, curve in zip(maps, masks, curves, strict=True):
        for threshold, value in zip(THRESHOLDS, curve, strict=True):
            region = map_.astype(np.float64) >= threshold
            assert value == pytest.approx((region & mask).sum() / (region | mask).sum())
    assert np.allclose(iou_curves(masks.astype(np.float32), masks), 1)  # a map that is the mask


def test_maps_as_metrics_see_them() -> None:
    values = np.array([[[-1.0, 2.0], [0.5, 4.0]], [[-3.0, -1.0], [0.0, -2.0]]], np.float32)
    seen = positive(values)
    assert seen[0].tolist() == [[0, 0.5], [0.125, 1]]
    assert (seen[1] == 1).all()  # nothing is positive: the map states no position
    large = at_image_size(values, (8, 6))
    assert large.shape == (2, 8, 6) and (large.max((1, 2)) == 1).all() and large.min() >= 0
    scaled = at_image_size(7e-20 * values, (8, 6))
    assert np.allclose(scaled, large, atol=1e-6)


def test_a_blob_on_the_object_is_found_and_one_beside_it_is_not() -> None:
    y, x = np.mgrid[:16, :16]
    blob = np.exp(-((y - 4) ** 2 + (x - 4) ** 2) / 8).astype(np.float32)
    maps = at_image_size(np.stack([blob, blob[::-1]]), (32, 32))
    masks = np.zeros((2, 32, 32), dtype=bool)
    masks[:, 4:14, 4:14] = True
    assert pointing(maps, masks).tolist() == [1, 0]
    assert energy(maps, masks)[0] > 0.6 > 0.05 > energy(maps, masks)[1]
    assert iou_curves(maps, masks).max(1)[0] > 0.75


@pytest.mark.parametrize(
    ("name", "metric"), [("RelevanceMassAccuracy", energy), ("AttributionLocalisation", energy), ("PointingGame", pointing)]
)
def test_values_of_quantus(name: str, metric: Callable[..., NDArray[np.float64]]) -> None:
    package = oracle.load("localisation", "quantus")
    values = metric(package["maps"], package["masks"])
    assert np.abs(package[name] - values).max() < 1e-6 and 0 < values.mean() < 1
