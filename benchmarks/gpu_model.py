"""A model of the cost of one batch on a GPU: bytes, operations and launches of each stage, and from these the seconds on common GPUs.

    seconds of a stage = bytes / (MEMORY x bandwidth) + operations / (ARITHMETIC x rate)

The stages of successive batches overlap, so a batch takes as long as its slowest part: passes with maps and scores, upload, or download.
The processor launches maps and scores as one graph; the time of this launch is left out. The shares of the peak rates that are reached
(MEMORY, ARITHMETIC) are those of an H100; a test compares the model with the stored measurement of an H200. The figures of the other
GPUs are estimates from data sheets, not measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.markdown import header, joined, row
from kdx.runs.cost import EAGER_TOUCHES, batch_cost
from kdx.runs.hardware import ARITHMETIC, GPUS, MEMORY, Gpu

DECODING = 2.3e-3
"""Seconds in which one core decodes and resizes a JPEG of 500 x 375."""

LAUNCHES = 51
"""Launches for maps and scores of two networks at one layer; tests/explain/test_fused_layer.py counts them."""


@dataclass(frozen=True)
class Network:
    """One network on one image: operations of a pass (a product and a sum count as two), and the numbers that its convolutions write."""

    operations: float
    activations: float


RESNET50 = Network(8.2e9, 11.1e6)

FUSED_TOUCHES = 2
"""How often an activation is written or read in a runtime that computes normalisation, ReLU and sum together with the convolution."""


@dataclass(frozen=True)
class Case:
    """A batch: images, networks, channels and positions of the layer's float32 features, height and width of an image, permutations."""

    images: int = 256
    networks: int = 2
    channels: int = 2048
    positions: int = 49
    size: tuple[int, int] = (224, 224)
    permutations: int = 999


@dataclass(frozen=True)
class Cost:
    """Bytes of the GPU's memory, operations in float32 and in float16, launches, and bytes between host and GPU."""

    memory: float = 0.0
    float32: float = 0.0
    float16: float = 0.0
    launches: int = 0
    host: float = 0.0

    def seconds(self, gpu: Gpu) -> float:
        """The seconds on a GPU, if the parts of the stage do not overlap."""
        operations = self.float32 / gpu.float32 + self.float16 / gpu.float16
        return self.memory / (MEMORY * gpu.memory) + operations / ARITHMETIC + self.host / gpu.host


def costs(case: Case, network: Network = RESNET50) -> dict[str, Cost]:
    """The cost of each stage of a batch."""
    n, k = case.images, case.networks
    passes = {
        name: Cost(memory=k * n * network.activations * 2 * touches, float16=k * n * network.operations)
        for name, touches in (("passes, PyTorch", EAGER_TOUCHES), ("passes, fused", FUSED_TOUCHES))
    }
    maps = batch_cost(n, [(case.channels, case.positions)] * k, case.permutations)
    results = 4 * n * case.positions * (k + 6)
    return {
        "upload": Cost(host=3 * n * case.size[0] * case.size[1]),
        **passes,
        "maps and scores": Cost(memory=maps.memory, float32=maps.operations, launches=LAUNCHES),
        "results": Cost(host=results),
    }


def seconds(gpu: Gpu, case: Case = Case()) -> dict[str, float]:
    """The seconds of each stage, and of a ``batch`` whose stages overlap, with fused passes."""
    stages = {name: cost.seconds(gpu) for name, cost in costs(case).items()}
    busy = stages["passes, fused"] + stages["maps and scores"]
    return stages | {"batch": max(busy, stages["upload"], stages["results"])}


def cores(gpu: Gpu, case: Case = Case()) -> float:
    """The cores that decode JPEGs as fast as the GPU explains them."""
    return DECODING * case.images / seconds(gpu, case)["batch"]


# ---- tables of docs/gpu.md ----


def counts() -> str:
    """The bytes, operations and launches of a batch of the measured case."""
    lines = header("stage", "bytes of the GPU's memory", "operations", "launches", "bytes between host and GPU")
    for name, cost in costs(Case()).items():
        operations = _amount(cost.float32 + cost.float16, "")
        lines.append(row(name, _amount(cost.memory, "B"), operations, str(cost.launches or "–"), _amount(cost.host, "B")))
    return joined(lines) + "\n"


def estimates() -> str:
    """A row per GPU."""
    names = ("passes, PyTorch", "passes, fused", "maps and scores", "upload")
    lines = header("GPU", *names, "maps and scores relative to fused passes", "images/s", "cores to decode as fast")
    for gpu in GPUS:
        times = seconds(gpu)
        share = times["maps and scores"] / times["passes, fused"]
        rate = Case().images / times["batch"]
        lines.append(row(gpu.name, *(_milliseconds(times[name]) for name in names), f"{share:.0%}", f"{rate:,.0f}", f"{cores(gpu):.0f}"))
    return joined(lines) + "\n"


def _amount(value: float, unit: str) -> str:
    if not value:
        return "–"
    scale: Mapping[float, str] = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}
    power, prefix = next(((power, prefix) for power, prefix in scale.items() if value >= power), (1.0, ""))
    return f"{value / power:.3g} {prefix}{unit}".rstrip()


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms"
