"""The maps and images of quantus.npz, and the script that writes it with the metrics of Quantus:

pip install --target FOLDER --no-deps quantus opencv-python-headless
PYTHONPATH=FOLDER python -m tests.oracle.quantus
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests import oracle
from tests.oracle.road import Readout

LOCALISATION = ("RelevanceMassAccuracy", "AttributionLocalisation", "PointingGame")
_PLAIN: dict[str, Any] = {"abs": False, "normalise": False, "disable_warnings": True}


def _localisation(quantus: Any, random: np.random.Generator) -> dict[str, Any]:
    maps = (random.random((40, 1, 24, 24)) ** 4).astype(np.float32)
    masks = np.zeros((40, 1, 24, 24), dtype=bool)
    for mask in masks[:, 0]:
        top, left = random.integers(0, 14, 2)
        mask[top : top + 10, left : left + 8] = True
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 3))
    batch = {"x_batch": np.zeros((40, 3, 24, 24), np.float32), "y_batch": np.zeros(40, int), "a_batch": maps, "s_batch": masks}
    values = {name: getattr(quantus, name)(**_PLAIN)(network, **batch, device="cpu") for name in LOCALISATION}
    return {"localisation/maps": maps[:, 0], "localisation/masks": masks[:, 0]} | {
        f"localisation/{name}": np.asarray(value, np.float64) for name, value in values.items()
    }


def _deletion(quantus: Any) -> dict[str, Any]:
    """Quantus removes values and not pixels, so the images have one channel. Its black is the smallest value of the image, here 0."""
    known = oracle.load("road", "road")
    images = known["images"][:, :1]
    images = images - images.min((1, 2, 3), keepdims=True)
    metric = quantus.PixelFlipping(features_in_step=12, perturb_baseline="black", **_PLAIN)
    network = Readout(known["weight"][:120]).eval()
    values = metric(network, images, known["classes"], known["maps"][:, None], softmax=True, device="cpu", channel_first=True)
    return {"deletion/images": images, "deletion/values": np.asarray(values, np.float64)}


def _sensitivity(quantus: Any, random: np.random.Generator) -> dict[str, Any]:
    """Of maps that are the sums of squares over the channels."""
    images = (0.1 + 0.8 * random.random((5, 3, 6, 7))).astype(np.float32)
    noisy = images + random.uniform(-0.05, 0.05, (10, *images.shape)).astype(np.float32)
    draws = iter(noisy.reshape(10, 5, -1))
    metric = quantus.MaxSensitivity(nr_samples=10, perturb_func=lambda **_: next(draws), **_PLAIN)
    values = metric(
        nn.Sequential(nn.Flatten(), nn.Linear(126, 2)).eval(),
        images,
        np.zeros(5, int),
        np.square(images).sum(1)[:, None],
        explain_func=lambda model, inputs, targets, **_: np.square(np.asarray(inputs)).sum(1)[:, None],
        device="cpu",
        channel_first=True,
    )
    return {"sensitivity/images": images, "sensitivity/noisy": noisy, "sensitivity/values": np.asarray(values, np.float64)}


def _write() -> None:
    import_module("tests.conftest")  # it registers the operators that torchvision misses on some builds of PyTorch
    quantus = import_module("quantus")
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    content = _localisation(quantus, random) | _deletion(quantus) | _sensitivity(quantus, random)
    np.savez_compressed(Path(__file__).with_name("quantus.npz"), **content)


if __name__ == "__main__":
    _write()
