"""The cost of the geometry of a whole set: both sweeps over all pairs of images, beside the networks' passes and the bare products.

Each case measures one layer of a student and a base in a fresh process, from random float32 features in files, with 999 permutations: all
inner products, UniCAM's maps and the maps that add up to the scores (`kdx.explain.whole_set.measure_set`). *Bare products* is the time of
as many operations in plain matrix products: one Gram product of the images per network, of which half is enough, and the same number of
operations again for the products of every position. *Passes* is the time of both networks for these images, extrapolated from a few
batches in memory.

It prints a table and stores it in benchmarks/results/whole.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.folder import NETWORK, SIDE
from benchmarks.record import child, peak_bytes, store
from kdx import models
from kdx.explain.explainer import Explainer
from kdx.explain.settings import Settings
from kdx.explain.whole_set import SetRows, measure_set
from kdx.features.rows import rows_of
from kdx.features.target import Target

MODULE = "benchmarks.whole"
ROLES = ("student", "base")


@dataclass(frozen=True)
class Case:
    """n images with features of this shape. passes: whether the networks, of which this is layer4, are timed too."""

    n: int
    channels: int
    side: int
    passes: bool = False

    @property
    def name(self) -> str:
        return f"{self.n:,} images, {self.channels} x {self.side} x {self.side}"

    @property
    def operations(self) -> float:
        """Of both sweeps and both networks: half a Gram product, and the products of every position for half the pairs."""
        return 2 * 2 * self.n**2 * self.channels * self.side**2


CASES = (Case(2_000, 512, 7, passes=True), Case(10_000, 512, 7), Case(1_000, 64, 112))
QUICK = (Case(256, 64, 7),)


def sweeps(case: Case) -> dict[str, float]:
    """Seconds of both sweeps, and the peak memory of the process."""
    generator = np.random.default_rng(0)
    labels = torch.arange(case.n) % 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features = {}
        for role in ROLES:
            shape = case.n, case.side, case.side, case.channels
            array = np.lib.format.open_memmap(folder / f"{role}.npy", "w+", "float32", shape)
            for start in range(0, case.n, 64):
                block = array[start : start + 64]
                shift = labels[start : start + 64].numpy()[:, None, None, None] / 10
                np.maximum(generator.standard_normal(block.shape, dtype=np.float32) + shift, 0, out=block)
            rows = rows_of(array.reshape(case.n, -1), role)
            features[role] = SetRows(rows, (case.channels, case.side, case.side))
        start_time = time.perf_counter()
        measurement = measure_set(
            features, Target.of(labels), Settings(), lambda kind, shape: torch.empty(shape), shuffled=True, folder=folder
        )
        seconds = time.perf_counter() - start_time
        if not bool(measurement.products.isfinite().all()):
            raise RuntimeError(f"{case.name}: the inner products are not finite")
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def speed() -> float:
    """Operations per second of float32 matrix products: the best of five."""
    x = torch.rand(1024, 8192)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _ = x @ x.T
        times.append(time.perf_counter() - start)
    return 2 * 1024 * 1024 * 8192 / min(times)


def passes(case: Case, batch: int = 64, batches: int = 4) -> float:
    """Seconds of both networks for the images of a case, from ``batches`` batches."""
    torch.manual_seed(0)
    networks = {role: models.load(NETWORK).module for role in ROLES}
    with Explainer.of(networks, ["layer4"], Settings()) as explainer:
        images = torch.rand(batch, 3, SIDE, SIDE)
        explainer.features(images)
        start = time.perf_counter()
        for _ in range(batches):
            explainer.features(images)
        return (time.perf_counter() - start) * case.n / (batch * batches)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The medians of a case."""
    runs = [child(MODULE, "--case", json.dumps(asdict(case))) for _ in range(rounds)]
    bare = case.operations / speed()
    row = {
        **asdict(case),
        "seconds": float(np.median([run["seconds"] for run in runs])),
        "samples": [run["seconds"] for run in runs],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "bare_seconds": bare,
        "feature_bytes": 4 * len(ROLES) * case.n * case.channels * case.side**2,
    }
    return row | ({"pass_seconds": passes(case)} if case.passes else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case; nothing is stored")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # for the fresh processes
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(sweeps(Case(**json.loads(arguments.case)))))
        return
    rows = [measure(case, arguments.rounds) for case in (QUICK if arguments.quick else CASES)]
    if not arguments.quick:
        store("whole", MODULE, {"threads": torch.get_num_threads(), "cases": rows})
    table = Table("case", "sweeps", "bare products", "passes", "peak memory", "features")
    for row in rows:
        name = Case(row["n"], row["channels"], row["side"]).name
        ratio = f"{row['pass_seconds']:.1f} s ({row['seconds'] / row['pass_seconds']:.1%})" if "pass_seconds" in row else ""
        sizes = (f"{row[key] / 1e9:.2f} GB" for key in ("peak_bytes", "feature_bytes"))
        table.add_row(name, f"{row['seconds']:.1f} s", f"{row['bare_seconds']:.1f} s", ratio, *sizes)
    Console().print(table)


if __name__ == "__main__":
    main()
