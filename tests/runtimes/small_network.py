"""A small network for the tests of the runtimes, its graph, its images, and what a GPU must agree with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.runner import Runner

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Relative to an output's largest value: float32 sums in another order."""


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, 2)
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv2(self.norm(self.conv1(images)).relu()).relu().mean((2, 3)))
        return logits


def graph(network: nn.Module) -> FeatureGraph:
    return FeatureGraph(network, ["conv2", "norm"], Preprocessing(None, (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)))


def images(n: int, size: tuple[int, int] = (11, 9)) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n))


GPU_TOLERANCE = 1e-4
"""Relative to an output's largest value: float32 without TensorFloat-32, with other algorithms."""


def check_on_gpu(runner: Runner, network: nn.Module) -> None:
    """Checks the CPU's numbers on the GPU, with any current stream and with work that follows immediately."""
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for n in (2, 5, 6):
                expected = EagerRunner(graph(network), CPU).infer(images(n))
                pixels = images(n).cuda(non_blocking=True)
                for _ in range(3):  # PyTorch reuses memory while passes are running
                    actual = runner.infer(pixels * 0.5 + pixels * 0.5)
                    summed = actual.features["norm"].sum((1, 2, 3))
                    assert actual.logits.device == runner.device and runner.device.type == "cuda"
                    for ours, theirs in (
                        (actual.logits, expected.logits),
                        (actual.features["conv2"], expected.features["conv2"]),
                        (summed, expected.features["norm"].sum((1, 2, 3))),
                    ):
                        assert float((ours.cpu() - theirs).abs().max()) <= GPU_TOLERANCE * float(theirs.abs().max())
