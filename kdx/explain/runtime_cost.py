"""The expected cost of a runtime: whether exporting the networks takes less time than it saves."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kdx.runtimes.eager import EagerRunner

_SAVED = 0.4
"""The share of PyTorch's time for a pass that ONNX Runtime and OpenVINO save on a CPU; measured: 0.4 to 0.5 for residual networks."""

_START, _PER_NETWORK, _PER_MODULE = 2.3, 1.0, 0.02
"""Seconds of one free core that an export takes: once for the packages, per network, and per module of a network."""

_STEPS, _STEPS_SECONDS = 400_000, 0.012
"""Steps of a Python loop, and the seconds that they took on the same core. An export is Python code, so it slows down as the loop does: on
slower cores, and beside other processes."""

_COMPARED_IMAGES = 10
"""The images that PyTorch computes for the comparison of an exported file."""

FEW_IMAGES = 8
"""For at most this many images nothing is measured: no export pays."""


@dataclass(frozen=True)
class ExportCost:
    """networks: to export. exporting: the seconds that this takes. saved: the seconds that each image then saves in all networks."""

    networks: int
    exporting: float
    saved: float

    @classmethod
    def measured(cls, runners: Iterable[EagerRunner], image_size: tuple[int, int], exports: int, passes: float) -> ExportCost:
        """The cost for networks that run in PyTorch, from the time of a pass of two images.

        exports: the files per network. passes: the passes per image, in multiples of a forward pass.
        """
        slowness = _loop_seconds() / _STEPS_SECONDS
        images = torch.rand(2, 3, *image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        networks, exporting, per_image = 0, slowness * _START, 0.0
        for runner in runners:
            runner.infer(images)  # the first pass also checks the network and allocates memory
            start = time.perf_counter()
            runner.infer(images)
            seconds = (time.perf_counter() - start) / len(images)
            modules = sum(1 for _ in runner.graph.modules())
            networks += 1
            exporting += exports * (slowness * (_PER_NETWORK + _PER_MODULE * modules) + _COMPARED_IMAGES * seconds)
            per_image += seconds
        return cls(networks, exporting, _SAVED * passes * per_image)

    def pays(self, images: int) -> bool:
        """Whether exporting saves time for this number of images."""
        return self.saved * images > self.exporting

    def why(self, images: int, runtime: str) -> str:
        """The comparison in words."""
        saved, exporting = _seconds(self.saved * images), _seconds(self.exporting)
        count = f"{images:,} image{'s' if images != 1 else ''}"
        return f"{runtime} would save about {saved} for {count}, and exporting {self.networks} networks takes about {exporting}"


def _loop_seconds() -> float:
    """The seconds that the loop of _STEPS takes now: the median of three."""
    times = []
    for _ in range(3):
        start, total = time.perf_counter(), 0
        for step in range(_STEPS):
            total += step
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 9.5 else f"{value:.1f} s"
