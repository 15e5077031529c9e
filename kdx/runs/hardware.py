"""The rates of GPUs in their data sheets, and the shares of these rates that kdx reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdx.choices import Precision
from kdx.errors import KdxError
from kdx.runs.cost import CHUNK, Cost

MEMORY, ARITHMETIC = 0.85, 0.5
"""The shares of a GPU's peak bandwidth and peak rate that a stage reaches, as measured on an H100."""


@dataclass(frozen=True)
class Gpu:
    """The rates in a data sheet.

    memory: bytes per second of its memory. float32: operations per second without TensorFloat-32. float16: operations per second of the
    matrix units without sparsity. host: bytes per second of copies from and to the host. tf32: operations per second of the matrix
    units in TensorFloat-32; 0 for a GPU that does not have it.
    """

    name: str
    memory: float
    float32: float
    float16: float
    host: float
    tf32: float = 0.0

    def passes(self, precision: Precision) -> float:
        """Operations per second of the networks' passes."""
        return self.tf32 or self.float32 if precision == "tf32" else self.float32


GPUS = (
    Gpu("T4", 320e9, 8.1e12, 65e12, 12e9),
    Gpu("A10", 600e9, 31.2e12, 125e12, 24e9, 62.5e12),
    Gpu("L4", 300e9, 30.3e12, 121e12, 24e9, 60e12),
    Gpu("RTX 4090", 1008e9, 82.6e12, 165e12, 24e9, 82.6e12),
    Gpu("A100 80 GB", 2039e9, 19.5e12, 312e12, 24e9, 156e12),
    Gpu("H100", 3350e9, 66.9e12, 989e12, 50e9, 495e12),
    Gpu("H200", 4800e9, 66.9e12, 989e12, 50e9, 495e12),
)


CORES = 12
"""The cores per GPU that are assumed unless they are given."""


@dataclass(frozen=True)
class Cluster:
    """Equal machines with GPUs.

    gpus: per machine. cores: per GPU, which decode images. disk: bytes per second of a machine's disk. memory: bytes of a machine. The
    defaults of the last three are assumptions about usual machines, not data of a vendor.
    """

    gpu: Gpu
    machines: int = 1
    gpus: int = 1
    cores: int = CORES
    disk: float = 2e9
    memory: float = 1e12

    @property
    def count(self) -> int:
        """The number of all GPUs."""
        return self.machines * self.gpus

    @property
    def name(self) -> str:
        machines, each = ("1 machine", "") if self.machines == 1 else (f"{self.machines:,} machines", " each")
        return f"{machines} with {self.gpus:,} x {self.gpu.name} and {self.cores * self.gpus:,} cores{each}"


def cluster_of(gpu: str | None, machines: int = 1, gpus: int = 1, cores: int = CORES) -> Cluster | None:
    """The machines with a GPU by name; None without one. Raises KdxError for an unknown name, and for numbers without a name."""
    if gpu is not None:
        return Cluster(find_gpu(gpu), machines, gpus, cores)
    if (machines, gpus, cores) != (1, 1, CORES):
        raise KdxError("The numbers of machines, GPUs and cores describe other hardware.", "Name its GPU, such as --on h100.")
    return None


def find_gpu(name: str) -> Gpu:
    """The GPU with a name such as ``h100`` or ``RTX 4090``. Raises KdxError for one that is not in GPUS."""
    wanted = _plain(name)
    matches = [gpu for gpu in GPUS if _plain(gpu.name) == wanted] or [gpu for gpu in GPUS if wanted and _plain(gpu.name).startswith(wanted)]
    if len(matches) != 1:
        raise KdxError(f"kdx does not know the rates of a GPU {name!r}.", f"Choose one of {', '.join(gpu.name for gpu in GPUS)}.")
    return matches[0]


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def cluster_seconds(
    cluster: Cluster, stages: Mapping[str, Cost], images: int, core_seconds: float, precision: Precision
) -> dict[str, float]:
    """The seconds of each stage, divided evenly over a cluster, and of decoding. They are estimates from data sheets.

    One process writes all maps. stages: the costs of `kdx.runs.cost.Work.stages`. core_seconds: the seconds in which one core decodes an
    image.
    """
    gpu, seconds = cluster.gpu, {"decoding": images * core_seconds / (cluster.cores * cluster.count)}
    for name, cost in stages.items():
        rate = gpu.passes(precision) if name == "passes" else gpu.float32
        on_gpu = cost.operations / (ARITHMETIC * rate) + cost.memory / (MEMORY * gpu.memory)
        seconds[name] = on_gpu / cluster.count + cost.disk / (cluster.disk * cluster.machines) + CHUNK * cost.chunks
    return seconds
