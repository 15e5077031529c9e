"""The localisation metrics of Quantus on the same maps and masks, where Quantus is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdx.evaluate.localisation import energy, pointing

quantus = pytest.importorskip("quantus")


@pytest.fixture
def arguments() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    maps = (rng.random((40, 1, 24, 24)) ** 4).astype(np.float32)
    masks = np.zeros((40, 1, 24, 24), dtype=bool)
    for mask in masks[:, 0]:
        top, left = rng.integers(0, 14, 2)
        mask[top : top + 10, left : left + 8] = True
    images, classes = np.zeros((40, 3, 24, 24), np.float32), np.zeros(40, dtype=int)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 24, 3))
    return {"model": network, "x_batch": images, "y_batch": classes, "a_batch": maps, "s_batch": masks, "device": "cpu"}


@pytest.mark.parametrize(
    ("name", "metric"), [("RelevanceMassAccuracy", energy), ("AttributionLocalisation", energy), ("PointingGame", pointing)]
)
def test_values(name: str, metric: Any, arguments: dict[str, Any]) -> None:
    theirs = getattr(quantus, name)(abs=False, normalise=False, disable_warnings=True)(**arguments)
    ours = metric(arguments["a_batch"][:, 0], arguments["s_batch"][:, 0])
    assert np.abs(np.array(theirs, dtype=np.float64) - ours).max() < 1e-6
    assert 0 < ours.mean() < 1
