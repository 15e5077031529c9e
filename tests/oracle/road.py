"""The images, maps and network of road.npz, and the script that writes it with pytorch-grad-cam's ROAD:

pip install --target FOLDER --no-deps grad-cam ttach opencv-python-headless
PYTHONPATH=FOLDER python -m tests.oracle.road
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SIZE = (10, 12)
"""A multiple of ten pixels, so that the package's percentiles and kdx's shares remove the same number."""

PERCENTILES = tuple(range(10, 100, 10))


class Readout(nn.Module):
    """Logits [n, 3] that are linear in the pixels."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


def _write() -> None:
    import_module("tests.conftest")  # it registers the operators that torchvision misses on some builds of PyTorch
    from pytorch_grad_cam.metrics import road
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    random = np.random.default_rng(0)
    images = random.random((4, 3, *SIZE), dtype=np.float32)
    maps = random.random((4, *SIZE), dtype=np.float32)
    weight = random.normal(size=(3 * images[0, 0].size, 3)).astype(np.float32) / 10
    classes = np.array([0, 2, 1, 1])
    targets = [ClassifierOutputSoftmaxTarget(int(number)) for number in classes]
    content: dict[str, Any] = {"images": images, "maps": maps, "weight": weight, "classes": classes}
    imputer = road.NoisyLinearImputer(noise=0)
    for name, remove in (("most", road.RemoveMostRelevantFirst), ("least", road.RemoveLeastRelevantFirst)):
        for percentile in PERCENTILES:
            metric = road.PerturbationConfidenceMetric(remove(percentile, imputer))
            content[f"{name}/{percentile}"] = metric(torch.from_numpy(images), maps, targets, Readout(weight), return_diff=False)
    np.savez_compressed(Path(__file__).with_name("road.npz"), **{f"road/{name}": value for name, value in content.items()})


if __name__ == "__main__":
    _write()
