"""Measures memory, open files, threads and seconds per batch of a run over 100,000 images, and the plan of a million images.

The images are drawn at random in a NumPy file and the networks are tiny, so the run consists mainly of kdx's own work per batch: the plan,
decoding, passes, geometry, records, maps and progress. The process is sampled after every batch. The tenths of the run are compared: the
first contains the start, and the second is the reference.

It prints a table and stores the figures in benchmarks/results/long.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.record import child, peak_bytes, store
from kdx import progress
from kdx.choices import GeometryName
from kdx.commands import explain
from kdx.runs.plan import Plan, RunOptions

MODULE = "benchmarks.long"
NETWORK = "kdx:resnet,width=4,depth=1,stages=2,classes=10"
SIDE, BATCH, PERMUTATIONS = 16, 64, 99
FLAT = 1.03
"""The most memory of the last tenth, relative to the second."""

COLUMNS = ("seconds", "resident bytes", "open files", "threads")


def write_data(folder: Path, images: int, side: int = SIDE) -> Path:
    """A NumPy file of random images with labels, and a models file of a student and a base with random weights."""
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 256, (images, side, side), dtype=np.uint8)
    np.savez(folder / "images.npz", images=levels, labels=np.arange(images) % 10)
    (folder / "models.toml").write_text(f'student = "{NETWORK}"\nbase = "{NETWORK}"\nlayers = ["layer2"]\n')
    return folder / "images.npz"


def state() -> tuple[float, int, int, int]:
    """The values of COLUMNS for this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        time.perf_counter(),
        pages * os.sysconf("SC_PAGE_SIZE"),
        sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threading.active_count(),
    )


def long_run(folder: Path, geometry: GeometryName) -> dict[str, Any]:
    """Explain all images of ``folder``, and sample the process at every batch."""
    samples: list[tuple[float, ...]] = []

    def show(task: str, done: float, total: int, note: str) -> None:
        if task in ("Explaining", "Networks"):
            samples.append(state())

    options = RunOptions(batch=BATCH, geometry=geometry, permutations=PERMUTATIONS, runtime="eager", device="cpu", gallery=4)
    out = folder / "run"
    start = time.perf_counter()
    with progress.redirected(show):
        explain.run(str(folder / "images.npz"), folder / "models.toml", out, (), options, announce=lambda line: None)
    seconds = time.perf_counter() - start
    images = json.loads((out / "manifest.json").read_text())["images"]["explained"]
    return {"images": images, "seconds": seconds, "peak_bytes": peak_bytes(), **tenths(np.array(samples, dtype=np.float64))}


def tenths(samples: NDArray[np.float64]) -> dict[str, list[float]]:
    """For each tenth of the batches: the seconds per batch, and the medians of the other columns."""
    parts = np.array_split(samples, 10)
    result = {"seconds per batch": [float((part[-1, 0] - part[0, 0]) / (len(part) - 1)) for part in parts]}
    for number, name in enumerate(COLUMNS[1:], 1):
        result[name] = [float(np.median(part[:, number])) for part in parts]
    return result


def plan(folder: Path) -> dict[str, Any]:
    """The seconds and the memory of the plan of all images of ``folder``."""
    before, start = state()[1], time.perf_counter()
    run_plan = Plan.of(str(folder / "images.npz"), folder / "models.toml", (), RunOptions(batch=BATCH, split="all"))
    planned = time.perf_counter()
    resident = state()[1] - before
    _ = run_plan.batches
    batched = time.perf_counter()
    _ = run_plan.dataset.fingerprint
    return {
        "images": len(run_plan.indices),
        "seconds": planned - start,
        "seconds of the batches": batched - planned,
        "seconds of the fingerprint": time.perf_counter() - batched,
        "resident bytes": resident,
        "resident bytes with batches": state()[1] - before,
        "bytes of the file": (folder / "images.npz").stat().st_size,
        "peak_bytes": peak_bytes(),
    }


def measure(images: int, planned: int, geometry: GeometryName) -> dict[str, Any]:
    """Both parts, each in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), images)
        run = child(MODULE, "--part", "run", "--folder", name, "--geometry", geometry)
    if run["images"] != images:
        raise RuntimeError(f"{run['images']} of {images} images were explained")
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), planned, 4)
        return {"batch": BATCH, "geometry": geometry, "run": run, "plan": child(MODULE, "--part", "plan", "--folder", name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--planned", type=int, default=1_000_000, help="images of the plan")
    parser.add_argument("--geometry", choices=("batch", "reference", "whole"), default="batch")
    parser.add_argument("--part", choices=("run", "plan"), help=argparse.SUPPRESS)  # for the fresh processes
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        with contextlib.redirect_stdout(sys.stderr):
            result = plan(options.folder) if options.part == "plan" else long_run(options.folder, options.geometry)
        print(json.dumps(result))
        return
    record = store("long", MODULE, measure(options.images, options.planned, options.geometry))
    run = record["run"]
    table = Table("tenth", "seconds per batch", "resident memory", "open files", "threads", box=None)
    for number in range(10):
        resident = f"{run['resident bytes'][number] / 1e6:.1f} MB"
        counts = (f"{run[name][number]:.0f}" for name in ("open files", "threads"))
        table.add_row(str(number + 1), f"{run['seconds per batch'][number]:.4f}", resident, *counts)
    console = Console()
    console.print(table)
    growth = run["resident bytes"][9] / run["resident bytes"][1]
    console.print(f"{run['images']:,} images in {run['seconds']:.0f} s. The last tenth takes {growth:.3f} of the memory of the second.")
    plan_ = record["plan"]
    console.print(f"The plan of {plan_['images']:,} images: {plan_['seconds']:.1f} s and {plan_['resident bytes'] / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()
