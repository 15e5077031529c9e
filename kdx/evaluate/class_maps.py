"""Grad-CAM and HiResCAM of one network at several layers, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.export.graphs import GradientGraph
from kdx.maps.gradients import class_gradients
from kdx.models.network import Network
from kdx.runtimes.eager import EagerRunner

ClassMapPair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Grad-CAM and HiResCAM [n, h, w] of the same images."""


def class_maps(
    network: Network, layers: Sequence[str], parts: Iterable[tuple[Tensor, Tensor]], classes: int, device: torch.device
) -> dict[str, ClassMapPair]:
    """Both maps at each layer of the network, for the label of each image.

    parts: pixels [k, 3, H, W] in [0, 1] and labels [k], part by part. classes: the number of classes of the network.
    """
    maps: dict[str, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}
    with EagerRunner(GradientGraph(network.module, list(maps), network.preprocessing), device) as runner:
        for pixels, labels in parts:
            cotangents = torch.nn.functional.one_hot(labels, classes).to(runner.device)
            for _, gradients in class_gradients(runner, list(maps), pixels.to(runner.device), cotangents, None):
                for layer, (gap, elementwise) in maps.items():
                    gap.append(gradients[layer].maps("gap")[1].cpu())
                    elementwise.append(gradients[layer].maps("elementwise")[1].cpu())
    return {layer: (torch.cat(gap).numpy(), torch.cat(elementwise).numpy()) for layer, (gap, elementwise) in maps.items()}
