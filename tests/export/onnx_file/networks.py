"""Small networks, and their export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.export.parity import ParityReport
from kdx.models.network import weights_hash

TOLERANCE = 1e-5
"""Relative to an output's largest value: float32 sums in another order, through at most seven convolutions."""

PREPROCESSING = Preprocessing((15, 13), (0.4, 0.5, 0.3), (0.2, 0.3, 0.25))


class Plain(nn.Module):
    """One convolution, quick to export; ``last`` is applied to the logits."""

    def __init__(self, last: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)
        self.last = last

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).mean((2, 3)))
        return self.last(logits)


class Transformer(nn.Module):
    """A class token and 3 x 3 patches of an image of 12 x 12, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 10, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.position
        logits: Tensor = self.fc(self.block(tokens)[:, 0])
        return logits


class Branching(nn.Module):
    """Its forward pass depends on the pixels' values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.conv(images).mean((2, 3))
        return logits if images.min() > -1 else -logits


class FixedBatch(Plain):
    """``len`` returns a number to the tracer, and so fixes the batch size."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).reshape(len(images), 5)


@dataclasses.dataclass(frozen=True)
class Exported:
    path: Path
    graph: FeatureGraph
    report: ParityReport


def export(folder: Path, network: nn.Module, layers: list[str], preprocessing: Preprocessing, size: tuple[int, int]) -> Exported:
    graph = FeatureGraph(network.eval(), layers, preprocessing)
    path = folder / "sub" / f"{type(network).__name__}.onnx"
    report = onnx_file.write(
        graph, path, origin=Origin("a:network", weights_hash(network)), image_size=size, classes=("zero", "één", "<b>")
    )
    return Exported(path, graph, report)


def assert_agrees(exported: Exported, images: Tensor) -> None:
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = exported.graph(images)
    assert len(outputs) == len(expected) == 1 + len(exported.graph.layers)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.shape == tuple(theirs.shape)
        assert np.abs(ours - theirs.numpy()).max() <= TOLERANCE * float(theirs.abs().max())


def assert_portable(content: bytes, *folders: Path) -> None:
    for where in (*map(str, folders), "/site-packages", str(Path.cwd())):
        assert where.encode() not in content
