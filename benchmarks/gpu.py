"""Checks and times kdx on a GPU, in one run of at most ten minutes.

1. Every kernel is checked against its definition in float64 on new random inputs, and then timed against its lower bound: the time of the
   bytes that must move, at the bandwidth of a copy in the same run, plus that of the Gram product (cuBLAS) if it needs one.
2. One batch (two ResNet-50, 256 images, layer4): the kernels alone, compared with the published method; and the full path, which is
   everything except the two passes (uploads, target, permutations, checks, maps, scores and results on the host). Its steps run one after
   another here, while `kdx explain` overlaps them. Both are compared with two float16 passes on the same GPU, in the fastest of TensorRT,
   ONNX Runtime and PyTorch; the record states which.
3. The tests that use a GPU. The record lists the names of those that fail.
4. The decoder on the GPU, compared with Pillow.
5. `kdx explain` over 10,000 drawn JPEGs, with the time of each stage (`benchmarks.gpu_timeline`).

Times of the GPU are measured by events, after its cache is overwritten and all launches are queued; rows "by the clock" include the time
of the processor. The networks' weights are random, which does not change the timing. Float32 is computed without TensorFloat-32, except in
the row that names it.

The figures go to benchmarks/results/gpu.json, and to gpu.md beside it. With --toy everything runs on the CPU, where the emulation of the
kernels replaces a GPU, at sizes that take seconds. This tests the script; its times mean nothing. A toy run stores nothing unless
--out names a folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import benchmarks.record
from benchmarks import gpu_tables, gpu_timeline
from benchmarks.cases import RESNET50 as NETWORK
from benchmarks.gpu_batch import Batch, time_batch, time_graph, time_published
from benchmarks.gpu_checks import TESTS, compare_decoders, run_tests
from benchmarks.gpu_clock import Clock, CpuClock, GpuClock, median
from benchmarks.gpu_passes import BASELINES, time_passes
from benchmarks.kernel_cases import CHECKED, IN_PYTORCH, RESNET50, Check, Sizes, cases, check
from benchmarks.record import quartiles
from kdx.errors import KdxError
from kdx.kernels import cubins, cuda
from kdx.kernels.compilers import compilers
from kdx.kernels.precision import ieee_float32
from tests.host import running

PASSES_SHARE, PUBLISHED_TIMES, SHARES_TIMES = 0.05, 100, 1.5
"""Goals: the time of a batch's geometry, and of the full path, over that of the two forward passes, of the published method over that of
the geometry, and of the geometry with decomposition maps over the geometry without them."""


@dataclass(frozen=True)
class Scale:
    """The sizes of a measurement.

    checked: the sizes at which kernels are compared with the definitions. batch: the sizes of the timed kernels and of the batch. network,
    layer: the networks of the two passes. tests: the paths of the tests to run. decoded: JPEGs for the comparison of decoders. explained:
    JPEGs of the command; 0 leaves it out.
    """

    checked: tuple[Sizes, ...]
    batch: Sizes
    network: str
    layer: str
    tests: tuple[str, ...]
    decoded: int
    explained: int


FULL = Scale(CHECKED, RESNET50, NETWORK, "layer4", TESTS, decoded=128, explained=10_000)
TOY = Scale(
    CHECKED[:1],
    Sizes(12, (4, 3, 3), (4, 3, 3), (16, 16), stack=1, classes=2),
    "kdx:resnet,width=4,depth=1,classes=5",
    "layer2",
    (),
    decoded=4,
    explained=0,
)


def time_kernels(clock: Clock, sizes: Sizes, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """A copy's bandwidth, and a row for each wrapper at full size. Each is compared with PyTorch in float64 before it is timed."""
    bandwidth = clock.bandwidth()
    rows = []
    for case in cases(sizes, clock.device, seed, IN_PYTORCH):
        require(check(case))
        samples = clock.seconds(case.run)
        row: dict[str, Any] = {"name": case.name, "samples": samples, "bytes": case.bytes, "goal": case.goal}
        if case.bytes is not None:
            library = median(clock.seconds(case.library_call)) if case.library_call else 0.0
            row["floor"] = case.bytes / bandwidth + library
            row["share"] = row["floor"] / median(samples)
        rows.append(row)
    return bandwidth, rows


# ---- the measurement ----


def goals(rows: Sequence[dict[str, Any]], batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with the measured value and whether it holds. The keys are those of the stored record."""
    shares = [(f"{row['name']}: share of a copy's bandwidth", row["goal"], row["share"]) for row in rows if row["goal"] is not None]
    reference = baseline(batch)
    passes = median(batch[reference])
    compared = reference.removeprefix("passes, ")
    parts = {"kernels": "geometry", "maps and scores": gpu_tables.everything(batch), "full path": "full path"}
    of_geometry = median(batch["geometry and decomposition maps"]) / median(batch["geometry"])
    speedup = median(batch["published"]) / median(batch["geometry beside published"])
    return [
        *({"goal": name, "wanted": wanted, "found": share, "holds": share >= wanted} for name, wanted, share in shares),
        *(
            {"goal": f"{name} over two passes, {compared}", "wanted": PASSES_SHARE, "found": share, "holds": share <= PASSES_SHARE}
            for name, share in ((name, median(batch[part]) / passes) for name, part in parts.items())
        ),
        {"goal": "with decomposition maps", "wanted": SHARES_TIMES, "found": of_geometry, "holds": of_geometry <= SHARES_TIMES},
        {"goal": "times as fast as published", "wanted": PUBLISHED_TIMES, "found": speedup, "holds": speedup >= PUBLISHED_TIMES},
    ]


def baseline(batch: dict[str, Any]) -> str:
    """The name of the float16 passes with which the batch is compared: the fastest."""
    return min((name for name in BASELINES if name in batch), key=lambda name: median(batch[name]))


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
        raise KdxError("This benchmark needs an NVIDIA GPU, and PyTorch sees none.", "Run kdx doctor to see what is missing, or --toy.")
    device = torch.device("cuda", torch.cuda.current_device())
    cuda.launcher(device)
    return device


@ieee_float32()  # in PyTorch's passes and in the published method as well
def measure(clock: Clock, scale: Scale, seed: int) -> dict[str, Any]:
    """The record, which also contains the seconds of each part."""
    device, seconds = clock.device, {}

    def timed(name: str, part: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = part()
        seconds[name] = time.perf_counter() - start
        return result

    checks = timed("checks", lambda: [check(case) for sizes in scale.checked for case in cases(sizes, device, seed)])
    for result in checks:
        require(result)
    bandwidth, rows = timed("kernels", lambda: time_kernels(clock, scale.batch, seed))
    batch = Batch.drawn(scale.batch, device, seed)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 20
    samples = timed("batch", lambda: time_batch(clock, batch))
    published, images, difference = timed("published", lambda: time_published(clock, batch, memory))
    require(difference)
    passes, missing = timed("passes", lambda: time_passes(clock, scale.network, scale.layer, scale.batch, seed))
    graph, graph_difference, not_captured = timed("graph", lambda: time_graph(clock, batch))
    if graph_difference is not None:
        require(graph_difference)
    times: dict[str, Any] = samples | graph | published | passes | {"published images": images}
    return {
        "case": f"ResNet-50, 224 x 224, batch {scale.batch.images}, layer4" if scale is FULL else "toy sizes on the emulation",
        "device": _device(device),
        "seed": seed,
        "tf32": "forbidden, except in the row that names it",
        "checks": [{"name": result.name, "error": result.error, "tolerance": result.tolerance} for result in checks],
        "bandwidth": bandwidth,
        "kernels": rows,
        "batch": times,
        "baseline": baseline(times),
        "missing": missing | not_captured,
        "goals": goals(rows, times),
        "tests": timed("tests", lambda: run_tests(scale.tests)) if scale.tests else None,
        "decoder": timed("decoder", lambda: compare_decoders(device, scale.decoded, seed)),
        "command": timed("command", lambda: _command(device, scale.explained)) if scale.explained else None,
        "seconds": seconds,
    }


def _command(device: torch.device, images: int) -> dict[str, Any]:
    """`kdx explain` with its timeline."""
    with redirect_stdout(None):  # a run prints its progress
        return gpu_timeline.measure(images, 256, str(device))


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "the emulation on a CPU", "architecture": "", "driver": "", "cuda": None, "compiler": "g++"}
    compiler = compilers()[0]
    return {
        "name": torch.cuda.get_device_name(device),
        "architecture": cubins.architecture(torch.cuda.get_device_capability(device)),
        "driver": _driver_version(device),
        "cuda": torch.version.cuda,
        "compiler": f"{compiler.name} {compiler.version}",
    }


def _driver_version(device: torch.device) -> str:
    """The version that the driver's own tool reports, or an empty string without that tool."""
    command = ["nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def show(record: dict[str, Any], console: Console) -> None:
    """Print the record."""
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
    lines = [
        f"A copy moves {record['bandwidth'] / 1e9:.0f} GB/s. The published method ran on {record['batch']['published images']} images."
    ]
    lines += [f"{name}: not measured, because: {reason}" for name, reason in record["missing"].items()]
    lines += gpu_tables.checked(record)
    for line in lines:
        console.print(line, soft_wrap=True)
    for goal in record["goals"]:
        line = f"{goal['goal']}: {goal['found']:.3g}, wanted {goal['wanted']:g}"
        console.print(f"{'reached' if goal['holds'] else 'MISSED '} {line}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=30, help="samples of each time (default 30)")
    parser.add_argument("--toy", action="store_true", help="test the script on the CPU, at toy size; its times mean nothing")
    parser.add_argument("--out", type=Path, help="the folder of gpu.json and gpu.md (default benchmarks/results, and none with --toy)")
    seed = int(np.random.default_rng().integers(2**31))
    parser.add_argument("--seed", type=int, default=seed, help="seed of the inputs (default: a new one in each run)")
    options = parser.parse_args(arguments)
    try:
        clock: Clock = CpuClock(1) if options.toy else GpuClock(usable_gpu(), options.samples)
        with running() if options.toy else nullcontext():
            measurement = measure(clock, TOY if options.toy else FULL, options.seed)
    except KdxError as problem:
        print(problem, file=sys.stderr)
        return 2
    folder = options.out or (None if options.toy else benchmarks.record.RESULTS)
    record = {**benchmarks.record.origin("benchmarks.gpu"), **measurement}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        (folder / "gpu.md").write_text(gpu_tables.page(record), "utf-8")
    show(record, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
