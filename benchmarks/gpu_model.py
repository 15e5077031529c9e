"""A model of the cost of one batch on a GPU: bytes, operations and launches of each stage, and from these the seconds on common GPUs.

    seconds of a stage on the device = bytes / (MEMORY x bandwidth) + operations / (ARITHMETIC x rate)
    seconds of maps and scores       = the larger of that and launches x LAUNCH, the time of the processor

The stages of successive batches overlap, so a batch takes as long as its slowest part: passes with maps and scores, upload, or download.
The shares of the peak rates that are reached (MEMORY, ARITHMETIC) and the time of a launch are those of the one GPU that was measured, an
H100; a test compares the model with that measurement. The figures of the other GPUs are estimates from data sheets, not measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.markdown import header, joined, row

MEMORY, ARITHMETIC = 0.85, 0.5
"""The shares of a GPU's peak bandwidth and peak rate that a stage reaches."""

LAUNCH = 20e-6
"""Seconds of the processor per launch, including Python."""

DECODING = 2.3e-3
"""Seconds in which one core decodes and resizes a JPEG of 500 x 375."""

LAUNCHES = 51
"""Launches for maps and scores of two networks at one layer; tests/explain/test_fused_layer.py counts them."""


@dataclass(frozen=True)
class Gpu:
    """The rates in a data sheet.

    memory: bytes per second of its memory. float32: operations per second without TensorFloat-32. float16: operations per second of the
    matrix units without sparsity. host: bytes per second that copies from and to the host reach.
    """

    name: str
    memory: float
    float32: float
    float16: float
    host: float


GPUS = (
    Gpu("T4", 320e9, 8.1e12, 65e12, 12e9),
    Gpu("A10", 600e9, 31.2e12, 125e12, 24e9),
    Gpu("L4", 300e9, 30.3e12, 121e12, 24e9),
    Gpu("RTX 4090", 1008e9, 82.6e12, 165e12, 24e9),
    Gpu("A100 80 GB", 2039e9, 19.5e12, 312e12, 24e9),
    Gpu("H100", 3350e9, 66.9e12, 989e12, 50e9),
    Gpu("H200", 4800e9, 66.9e12, 989e12, 50e9),
)


@dataclass(frozen=True)
class Network:
    """One network on one image: operations of a pass (a product and a sum count as two), and the numbers that its convolutions write."""

    operations: float
    activations: float


RESNET50 = Network(8.2e9, 11.1e6)

EAGER_TOUCHES, FUSED_TOUCHES = 7, 2
"""How often an activation is written or read: in PyTorch, which computes normalisation, ReLU and sum as separate steps, and in a runtime
that computes them with the convolution."""


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
        return max(self.memory / (MEMORY * gpu.memory) + operations / ARITHMETIC, self.launches * LAUNCH) + self.host / gpu.host


def costs(case: Case, network: Network = RESNET50) -> dict[str, Cost]:
    """The cost of each stage of a batch."""
    n, k, features = case.images, case.networks, case.networks * case.images * case.channels * case.positions
    pairs = k * n * n * case.positions
    passes = {
        name: Cost(memory=k * n * network.activations * 2 * touches, float16=k * n * network.operations)
        for name, touches in (("passes, PyTorch", EAGER_TOUCHES), ("passes, fused", FUSED_TOUCHES))
    }
    # Features: read for norms, means and maps, and written and read once as rows. Products of all pairs at all positions: written by the
    # matrix product, read and written as squared differences, and read for the shares.
    geometry = 4 * (5 * features + 4 * pairs) + 8 * (k + 1) * n * n * 10
    operations = 2 * n * features + 2 * case.permutations * n * n * (k + 1)
    results = 4 * n * case.positions * (k + 6)
    return {
        "upload": Cost(host=3 * n * case.size[0] * case.size[1]),
        **passes,
        "maps and scores": Cost(memory=geometry, float32=operations, launches=LAUNCHES),
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
