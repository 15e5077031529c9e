"""The CUDA kernels on a GPU: each is checked against its definition on new random inputs, and then timed against its lower bound.

A lower bound is the time of the bytes that must move, at the bandwidth of a copy that is measured in the same run, plus the time of the
Gram product (cuBLAS) if the kernel needs one. The whole geometry of a batch (ResNet-50, layer4) is then compared with the two networks'
forward passes and with the published method: a broadcast of n x n x d differences and a backward pass through them.

Samples are GPU times, measured by events. The GPU's cache is overwritten before each. The networks' weights are random, which does not
change the timing. Float32 is computed without TensorFloat-32 everywhere, except in one row that says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import eager
from benchmarks.cases import RESNET50 as NETWORK
from benchmarks.kernel_cases import CHECKED, IN_PYTORCH, RESNET50, Check, cases, centred, check
from benchmarks.record import quartiles, store
from kdx import models
from kdx.errors import KdxError
from kdx.explain import layer
from kdx.explain.layer_graphs import LayerGraphs
from kdx.features.target import Target
from kdx.kernels import cubins, cuda, fused, fused_maps, geometry
from kdx.kernels.fused_shares import PositionSquares
from kdx.kernels.precision import ieee_float32, tf32
from kdx.scores import uncertainty
from tests.oracle import TOLERANCE, error

PASSES_SHARE, PUBLISHED_TIMES, SHARES_TIMES = 0.05, 100, 1.5
"""Goals: the time of a batch's geometry over that of the two forward passes, of the published method over that of the geometry, and of
the geometry with decomposition maps over the geometry without them."""


class Clock:
    """Measures GPU times after warming up, each with other data in the cache."""

    def __init__(self, device: torch.device, samples: int) -> None:
        self.device = device
        self.samples = samples
        # Overwriting this buffer takes so long that the launches are queued meanwhile.
        self._cache_filler = torch.empty(1 << 30, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], object]) -> list[float]:
        for _ in range(3):
            run()
        samples = []
        for _ in range(self.samples):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._cache_filler.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            samples.append(start.elapsed_time(end) / 1e3)
        return samples

    def bandwidth(self) -> float:
        """Bytes per second of a copy, read and written."""
        destination = torch.empty_like(self._cache_filler)
        return 2 * destination.nbytes / _median(self.seconds(lambda: destination.copy_(self._cache_filler)))


def time_kernels(clock: Clock, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """A copy's bandwidth, and a row for each wrapper at full size. Each is compared with PyTorch in float64 before it is timed."""
    bandwidth = clock.bandwidth()
    rows = []
    for case in cases(RESNET50, clock.device, seed, IN_PYTORCH):
        require(check(case))
        samples = clock.seconds(case.run)
        row: dict[str, Any] = {"name": case.name, "samples": samples, "bytes": case.bytes, "goal": case.goal}
        if case.bytes is not None:
            library = _median(clock.seconds(case.library_call)) if case.library_call else 0.0
            row["floor"] = case.bytes / bandwidth + library
            row["share"] = row["floor"] / _median(samples)
        rows.append(row)
    return bandwidth, rows


# ---- a whole batch ----


def explained(student: Tensor, base: Tensor, target: Tensor) -> list[Tensor]:
    """Everything that the kernels compute from features [n, C, H, W] of two networks and a target [n, e].

    Returns the channel weights of the distilled and of the residual maps [2, n, C], their scores [2], every inner product, and both maps.
    """
    return _explained(student, base, torch.stack([fused.distances(centred(values)) for values in (student, base, target)]))


def _explained(student: Tensor, base: Tensor, d: Tensor) -> list[Tensor]:
    means = torch.stack([fused_maps.means(student), fused_maps.means(base)])
    weights = fused.weights(d[[0, 1]], d[[1, 0]], d[[2, 2]], means)
    pairs = zip((student, base), weights.channel_weights, strict=True)
    maps = [fused_maps.cam(features, channel_weights) for features, channel_weights in pairs]
    return [weights.channel_weights, weights.score, fused.products(d[None]).inner, *maps]


def decomposed(student: Tensor, base: Tensor, target: Tensor) -> list[Tensor]:
    """The results of `explained`, and the shares [n, H W] of both networks in their inner products with the target."""
    positions = [PositionSquares.of(features.flatten(2)) for features in (student, base)]
    matrix = fused.distances(centred(target))
    d = torch.stack([*(each.distances.float() for each in positions), matrix])
    centred_matrix = geometry.u_centered(matrix.double())[None]
    shares = [each.shares(centred_matrix, [slice(0, len(student))])[0, 0] for each in positions]
    return [*_explained(student, base, d), *shares]


def published(student: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """The channel weights [2, n, C] of both maps by the published method, with one call per map."""
    return torch.stack([eager.published_geometry(x, y, target)[0] for x, y in ((student, base), (base, student))])


def compare(student: Tensor, base: Tensor, target: Tensor) -> Check:
    """Compare the channel weights of `explained` with those of `published`, whose float32 differences and backward pass also round."""
    actual, expected = explained(student, base, target)[0], published(student, base, target)
    return Check("the published method", error(actual.cpu(), expected.cpu()), 10 * TOLERANCE["float32"])


def time_batch(clock: Clock, seed: int) -> dict[str, Any]:
    """Samples of a batch's geometry, of the forward passes in two precisions, and of the published method on as many images as fit.

    The geometry is timed by the kernels alone, and as `kdx.explain.layer.measure` computes it around them.
    """
    generator = torch.Generator(clock.device).manual_seed(seed)
    n, device = RESNET50.images, clock.device
    labels = torch.arange(n, device=device) % RESNET50.classes
    one_hot, target = torch.nn.functional.one_hot(labels).float(), Target.of(labels)
    student, base = (torch.randn(n, *RESNET50.explained, generator=generator, device=device).relu_() for _ in range(2))
    samples: dict[str, Any] = {"geometry": clock.seconds(lambda: explained(student, base, one_hot))}
    samples["geometry and decomposition maps"] = clock.seconds(lambda: decomposed(student, base, one_hot))
    for permutations in (0, 999):
        table = uncertainty.permutation_table(n, permutations, seed, device)

        graphs = LayerGraphs()  # as a run keeps them

        def measured(table: Tensor = table, student: Tensor = student, base: Tensor = base, graphs: LayerGraphs = graphs) -> object:
            return layer.measure({"student": student, "base": base}, target, permutations=table, graphs=graphs)

        samples[f"maps and scores, {permutations} permutations"] = clock.seconds(measured)
        graphs.close()
    samples["passes, float32"] = _time_passes(clock, torch.float32, generator)
    with tf32():
        samples["passes, TF32"] = _time_passes(clock, torch.float32, generator)
    samples["passes, float16"] = _time_passes(clock, torch.float16, generator)
    torch.cuda.empty_cache()
    image_bytes, memory = student[0].nbytes, torch.cuda.get_device_properties(device).total_memory
    # All differences exist five times at once (`eager.published`), beside the memory that PyTorch keeps.
    few = next(n // divisor for divisor in (1, 2, 4, 8, 16) if 6 * (n // divisor) ** 2 * image_bytes < memory)
    student, base, one_hot = student[:few], base[:few], one_hot[:few]
    require(compare(student, base, one_hot))
    samples["published images"] = few
    samples["published"] = clock.seconds(lambda: published(student, base, one_hot))
    samples["geometry beside published"] = clock.seconds(lambda: explained(student, base, one_hot))
    return samples


def _time_passes(clock: Clock, dtype: torch.dtype, generator: torch.Generator) -> list[float]:
    """Samples of the forward passes of two networks in channels-last."""
    networks = [models.load(NETWORK).module.eval().to(clock.device, dtype) for _ in range(2)]
    for network in networks:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(RESNET50.images, 3, *RESNET50.picture, generator=generator, device=clock.device)
    images = images.to(dtype, memory_format=torch.channels_last)

    def passes() -> None:
        with torch.no_grad():
            for network in networks:
                network(images)

    return clock.seconds(passes)


# ---- the report ----


def goals(rows: Sequence[dict[str, Any]], batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with the measured value and whether it holds. The keys are those of the stored record."""
    shares = [(f"{row['name']}: share of a copy's bandwidth", row["goal"], row["share"]) for row in rows if row["goal"] is not None]
    of_passes = _median(batch["geometry"]) / _median(batch["passes, float16"])
    of_geometry = _median(batch["geometry and decomposition maps"]) / _median(batch["geometry"])
    speedup = _median(batch["published"]) / _median(batch["geometry beside published"])
    return [
        *({"goal": name, "wanted": wanted, "found": share, "holds": share >= wanted} for name, wanted, share in shares),
        {"goal": "geometry over two float16 passes", "wanted": PASSES_SHARE, "found": of_passes, "holds": of_passes <= PASSES_SHARE},
        {"goal": "with decomposition maps", "wanted": SHARES_TIMES, "found": of_geometry, "holds": of_geometry <= SHARES_TIMES},
        {"goal": "times as fast as published", "wanted": PUBLISHED_TIMES, "found": speedup, "holds": speedup >= PUBLISHED_TIMES},
    ]


def require(result: Check) -> None:
    """Raise KdxError if a check does not hold."""
    if not result.holds:
        raise KdxError(
            f"The kernels are wrong here: {result.name} is off by {result.error:.1e}, and {result.tolerance:.0e} is allowed.",
            "No figure was stored. Report this with the GPU's name.",
        )


def usable_gpu() -> torch.device:
    """PyTorch's current GPU, with the kernels compiled for it. Raises KdxError if no GPU can run them."""
    if not torch.cuda.is_available():
        raise KdxError("This benchmark needs an NVIDIA GPU, and PyTorch sees none.", "Run kdx doctor to see what is missing.")
    device = torch.device("cuda", torch.cuda.current_device())
    cuda.launcher(device)
    return device


@ieee_float32()  # in PyTorch's passes and in the published method as well
def measure(device: torch.device, samples: int, seed: int) -> dict[str, Any]:
    checks = [check(case) for sizes in CHECKED for case in cases(sizes, device, seed)]
    for result in checks:
        require(result)
    clock = Clock(device, samples)
    bandwidth, rows = time_kernels(clock, seed)
    batch = time_batch(clock, seed)
    capability, compiler = torch.cuda.get_device_capability(device), cubins.compiler()
    return {
        "case": f"ResNet-50, 224 x 224, batch {RESNET50.images}, layer4",
        "device": {
            "name": torch.cuda.get_device_name(device),
            "architecture": cubins.architecture(capability),
            "driver": _driver_version(device),
            "cuda": torch.version.cuda,
            "compiler": f"{compiler.name} {compiler.version}",
        },
        "seed": seed,
        "checks": [{"name": result.name, "error": result.error, "tolerance": result.tolerance} for result in checks],
        "bandwidth": bandwidth,
        "kernels": rows,
        "batch": batch,
        "goals": goals(rows, batch),
    }


def _driver_version(device: torch.device) -> str:
    """The version that the driver's own tool reports, or an empty string without that tool."""
    command = ["nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _median(samples: Sequence[float]) -> float:
    return float(np.median(samples))


def show(record: dict[str, Any], console: Console) -> None:
    title = f"{record['device']['name']}, {record['case']}"
    table = Table("", "median", "quartiles", "lower bound", "lower bound over median", title=title, box=None)
    for row in record["kernels"]:
        low, median, high = (f"{value * 1e6:.1f}" for value in quartiles(row["samples"]))
        bound = (f"{row['floor'] * 1e6:.1f} µs", f"{row['share']:.0%}") if "floor" in row else ("", "")
        table.add_row(row["name"], f"{median} µs", f"{low} to {high}", *bound)
    for name, samples in record["batch"].items():
        if isinstance(samples, list):
            low, median, high = (f"{value * 1e3:.2f}" for value in quartiles(samples))
            table.add_row(name, f"{median} ms", f"{low} to {high}", "", "")
    console.print(table)
    console.print(
        f"A copy moves {record['bandwidth'] / 1e9:.0f} GB/s. The published method ran on {record['batch']['published images']} images.",
        soft_wrap=True,
    )
    for goal in record["goals"]:
        line = f"{goal['goal']}: {goal['found']:.3g}, wanted {goal['wanted']:g}"
        console.print(f"{'reached' if goal['holds'] else 'MISSED '} {line}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=30, help="samples of each time (default 30)")
    seed = int(np.random.default_rng().integers(2**31))
    parser.add_argument("--seed", type=int, default=seed, help="seed of the inputs (default: a new one in each run)")
    options = parser.parse_args(arguments)
    try:
        measurement = measure(usable_gpu(), options.samples, options.seed)
    except KdxError as problem:
        print(problem, file=sys.stderr)
        return 2
    show(store("gpu", "benchmarks.gpu", measurement), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
