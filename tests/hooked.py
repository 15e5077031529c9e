"""Small networks, and class maps as published: with hooks and an explicit backward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import GradientGraph, Preprocessing
from kdx.maps.class_maps import ClassMaps
from tests import oracle

SIZE = (13, 9)
CLASSES = 5
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)


class Net(nn.Module):
    """Three convolutions and a head that distinguishes positions, so that a gradient differs between positions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(7, 6, 3, 2)
        self.conv3 = nn.Conv2d(6, 4, 2)
        self.pool = nn.AdaptiveAvgPool2d((3, 2))
        self.fc = nn.Linear(24, CLASSES)
        for tensor in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            assert tensor is not None
            nn.init.normal_(tensor)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv2(self.relu(self.norm(self.conv1(images)))).tanh()
        logits: Tensor = self.fc(self.pool(self.conv3(features).relu()).flatten(1))
        return logits


class Block(nn.Module):
    """Attention and an MLP, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mixed = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        out: Tensor = tokens + self.mixed(tokens)
        return out


class Blocks(nn.Module):
    """A class token and patches pass through two blocks. The head reads only the class token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 3, 3)
        self.first, self.last = Block(), Block()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.last(self.first(torch.cat([tokens.mean(1, keepdim=True), tokens], 1)))[:, 0])
        return logits


def batch(n: int = 8, dtype: torch.dtype = torch.float64, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def hooked(network: nn.Module, images: Tensor, *layers: str) -> tuple[Tensor, ...]:
    """The logits and each layer's output, in one autograd graph."""
    kept: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            kept[layer] = output
            return output.clone()  # an in-place activation may follow

        return hook

    handles = [network.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    logits = network(images)
    for handle in handles:
        handle.remove()
    return logits, *(kept[layer] for layer in layers)


def agree(actual: Any, expected: Any, tolerance: float = oracle.TOLERANCE["float64"]) -> None:
    for name in ("maps", "weights"):
        assert float(np.abs(np.asarray(getattr(expected, name))).max()) > 0
        assert oracle.error(getattr(actual, name), getattr(expected, name)) < tolerance, name


def cam_of_gradient(feature: Tensor, gradient: Tensor, weighting: str) -> tuple[Tensor, Tensor]:
    weights = gradient.mean((2, 3))
    terms = weights[:, :, None, None] * feature if weighting == "gap" else gradient * feature
    return weights.detach(), terms.sum(1).clamp_min(0).detach()


def by_hand(network: nn.Module, images: Tensor, layer: str, classes: Tensor | None, weighting: str) -> ClassMaps[Tensor]:
    """As published: hooks, and one backward pass from the sum of the chosen logits."""
    logits, feature = hooked(network, images, layer)
    classes = logits.argmax(1) if classes is None else classes
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(images)), classes].sum(), feature)
    weights, maps = cam_of_gradient(feature, gradient, weighting)
    return ClassMaps(maps, weights, classes, logits.detach())


def exported(
    folder: Path, network: nn.Module, layers: list[str], at: str | None = None, preprocessing: Preprocessing = Preprocessing()
) -> Path:
    path = folder / "gradients.onnx"
    onnx_file.write(GradientGraph(network, layers, preprocessing, at), path, origin=Origin("net", "0" * 64), image_size=SIZE)
    return path
