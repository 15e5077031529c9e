"""The CUDA kernels on a GPU: every one checked against its definition on fresh random inputs, then timed against its floor.

A floor is the bytes that must move over the bandwidth of a copy measured in the same run, with the Gram product (cuBLAS) beside
it where there is one. Then the whole geometry of a batch (ResNet-50, layer4) is set against the two networks' forward passes and
against the method as it is published: a broadcast of n x n x d differences and a backward pass through them.

Samples are times of the GPU, by events, with its cache swept before each. The weights of the networks are random: they change
no timing.
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
from benchmarks.kernel_cases import CHECKED, IN_PYTORCH, RESNET50, Checked, cases, centred, check
from benchmarks.record import quartiles, store
from kdx import models
from kdx.errors import KdxError
from kdx.explain import layer
from kdx.features.target import Target
from kdx.kernels import cubins, cuda, fused, geometry
from kdx.scores import uncertainty
from tests.oracle import TOLERANCE, error

PASSES_SHARE, PUBLISHED_TIMES = 0.05, 100
"""The goals: a batch's geometry in this share of the two forward passes' time, and so many times as fast as the published method."""


class Clock:
    """Times of the GPU, after warming up, each with other data in the cache."""

    def __init__(self, device: torch.device, samples: int) -> None:
        self.device = device
        self.samples = samples
        self._swept = torch.empty(1 << 30, dtype=torch.uint8, device=device)  # takes so long that the launches are queued meanwhile

    def seconds(self, run: Callable[[], object]) -> list[float]:
        for _ in range(3):
            run()
        found = []
        for _ in range(self.samples):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._swept.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            found.append(start.elapsed_time(end) / 1e3)
        return found

    def bandwidth(self) -> float:
        """Bytes a second of a copy, those read and those written."""
        to = torch.empty_like(self._swept)
        return 2 * to.nbytes / _median(self.seconds(lambda: to.copy_(self._swept)))


def time_kernels(clock: Clock, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """A copy's bandwidth, and a row for each wrapper at full size, compared with PyTorch in float64 before it is timed."""
    bandwidth = clock.bandwidth()
    rows = []
    for case in cases(RESNET50, clock.device, seed, IN_PYTORCH):
        demand(check(case))
        samples = clock.seconds(case.run)
        row: dict[str, Any] = {"name": case.name, "samples": samples, "bytes": case.bytes, "goal": case.goal}
        if case.bytes is not None:
            besides = _median(clock.seconds(case.besides)) if case.besides else 0.0
            row["floor"] = case.bytes / bandwidth + besides
            row["share"] = row["floor"] / _median(samples)
        rows.append(row)
    return bandwidth, rows


# ---- a batch, whole ----


def explained(student: Tensor, base: Tensor, target: Tensor) -> list[Tensor]:
    """All that the kernels do for features [n, C, H, W] of two networks and a target [n, e]: the channel weights of the distilled and
    of the residual maps [2, n, C], their scores [2], every inner product, and both maps."""
    d = torch.stack([fused.distances(centred(each)) for each in (student, base, target)])
    means = torch.stack([geometry.gap(student), geometry.gap(base)])
    of = fused.weights(d[[0, 1]], d[[1, 0]], d[[2, 2]], means)
    maps = [fused.cam(each, weights) for each, weights in zip((student, base), of.channel_weights, strict=True)]
    return [of.channel_weights, of.score, fused.products(d[None]).inner, *maps]


def published(student: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """The channel weights [2, n, C] of both maps as the method is published, a call each."""
    return torch.stack([eager.published_geometry(x, y, target)[0] for x, y in ((student, base), (base, student))])


def compare(student: Tensor, base: Tensor, target: Tensor) -> Checked:
    """The channel weights of `explained` against those of `published`, whose float32 differences and backward pass round too."""
    found, expected = explained(student, base, target)[0], published(student, base, target)
    return Checked("the published method", error(found.cpu(), expected.cpu()), 10 * TOLERANCE["float32"])


def time_batch(clock: Clock, seed: int) -> dict[str, Any]:
    """A batch's geometry by the kernels and as kdx measures it, with what surrounds the kernels there; the forward passes in two
    precisions; and the published method on as many images as fit."""
    generator = torch.Generator(clock.device).manual_seed(seed)
    n, picture, device = RESNET50.images, RESNET50.picture, clock.device
    labels = torch.arange(n, device=device) % RESNET50.classes
    target, aim = torch.nn.functional.one_hot(labels).float(), Target.of(labels)
    student, base = (torch.randn(n, *RESNET50.explained, generator=generator, device=device).relu_() for _ in range(2))
    found: dict[str, Any] = {"geometry": clock.seconds(lambda: explained(student, base, target))}
    for permutations in (0, 999):
        table = uncertainty.permutation_table(n, permutations, seed, device)

        def measured(table: Tensor = table, student: Tensor = student, base: Tensor = base) -> object:
            return layer.measure({"student": student, "base": base}, aim, permutations=table)

        found[f"kdx.transfer, {permutations} permutations"] = clock.seconds(measured)
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        networks = [models.load(NETWORK).module.eval().to(device, dtype) for _ in range(2)]
        for network in networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.rand(n, 3, *picture, generator=generator, device=device).to(dtype, memory_format=torch.channels_last)

        def passes(networks: Sequence[torch.nn.Module] = networks, images: Tensor = images) -> None:
            with torch.no_grad():
                for network in networks:
                    network(images)

        found[f"passes, {name}"] = clock.seconds(passes)
        del networks, images, passes
    torch.cuda.empty_cache()
    each, memory = student[0].nbytes, torch.cuda.get_device_properties(device).total_memory
    # Five times all differences stand there at once, as `eager.published` says, beside what PyTorch keeps.
    few = next(n // by for by in (1, 2, 4, 8, 16) if 6 * (n // by) ** 2 * each < memory)
    student, base, target = student[:few], base[:few], target[:few]
    demand(compare(student, base, target))
    found["published images"] = few
    found["published"] = clock.seconds(lambda: published(student, base, target))
    found["geometry beside published"] = clock.seconds(lambda: explained(student, base, target))
    return found


# ---- the report ----


def goals(rows: Sequence[dict[str, Any]], batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured and whether it holds."""
    shares = [(f"{row['name']}: share of a copy's bandwidth", row["goal"], row["share"]) for row in rows if row["goal"] is not None]
    passes = _median(batch["geometry"]) / _median(batch["passes, float16"])
    faster = _median(batch["published"]) / _median(batch["geometry beside published"])
    return [
        *({"goal": name, "wanted": wanted, "found": share, "holds": share >= wanted} for name, wanted, share in shares),
        {"goal": "geometry over two float16 passes", "wanted": PASSES_SHARE, "found": passes, "holds": passes <= PASSES_SHARE},
        {"goal": "times as fast as published", "wanted": PUBLISHED_TIMES, "found": faster, "holds": faster >= PUBLISHED_TIMES},
    ]


def demand(checked: Checked) -> None:
    if not checked.holds:
        raise KdxError(
            f"The kernels are wrong here: {checked.name} is off by {checked.error:.1e}, and {checked.tolerance:.0e} is allowed.",
            "No figure was stored; report this with the GPU's name.",
        )


def usable_gpu() -> torch.device:
    """PyTorch's current GPU, with the kernels compiled for it; KdxError where there is none that can run them."""
    if not torch.cuda.is_available():
        raise KdxError("This benchmark runs on an NVIDIA GPU, and PyTorch sees none.", "kdx doctor says what is missing.")
    device = torch.device("cuda", torch.cuda.current_device())
    cuda.launcher(device)
    return device


def measure(device: torch.device, samples: int, seed: int) -> dict[str, Any]:
    checks = [check(case) for sizes in CHECKED for case in cases(sizes, device, seed)]
    for each in checks:
        demand(each)
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
        "checks": [{"name": each.name, "error": each.error, "tolerance": each.tolerance} for each in checks],
        "bandwidth": bandwidth,
        "kernels": rows,
        "batch": batch,
        "goals": goals(rows, batch),
    }


def _driver_version(device: torch.device) -> str:
    """As the driver's own tool says; empty where that is not there."""
    command = ["nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _median(samples: Sequence[float]) -> float:
    return float(np.median(samples))


def show(record: dict[str, Any], console: Console) -> None:
    table = Table("", "median", "quartiles", "floor", "floor over median", title=f"{record['device']['name']}, {record['case']}", box=None)
    for row in record["kernels"]:
        low, middle, high = (f"{value * 1e6:.1f}" for value in quartiles(row["samples"]))
        floor = (f"{row['floor'] * 1e6:.1f} µs", f"{row['share']:.0%}") if "floor" in row else ("", "")
        table.add_row(row["name"], f"{middle} µs", f"{low} to {high}", *floor)
    for name, samples in record["batch"].items():
        if isinstance(samples, list):
            low, middle, high = (f"{value * 1e3:.2f}" for value in quartiles(samples))
            table.add_row(name, f"{middle} ms", f"{low} to {high}", "", "")
    console.print(table)
    console.print(
        f"A copy moves {record['bandwidth'] / 1e9:.0f} GB/s. The published method ran on {record['batch']['published images']} images.",
        soft_wrap=True,
    )
    for goal in record["goals"]:
        found = f"{goal['goal']}: {goal['found']:.3g}, wanted {goal['wanted']:g}"
        console.print(f"{'holds ' if goal['holds'] else 'MISSED'} {found}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=30, help="of each time (30)")
    parser.add_argument("--seed", type=int, default=int(np.random.default_rng().integers(2**31)), help="of the inputs (another each run)")
    options = parser.parse_args(arguments)
    try:
        found = measure(usable_gpu(), options.samples, options.seed)
    except KdxError as problem:
        print(problem, file=sys.stderr)
        return 2
    show(store("gpu", "benchmarks.gpu", found), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
