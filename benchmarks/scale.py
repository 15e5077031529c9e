"""Compares the estimates of ``kdx plan`` with runs: the cost of additional images, in processor time of one thread.

Every case plans and explains a small and a large part of the same random images, each in a fresh process, and compares the differences,
which contain neither the start nor the page. The clock is the processor time of all threads of the process, which other processes on the
machine hardly change; the trial of the plan uses it too.

It prints a table and stores the figures in benchmarks/results/scale.json. Run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.long import NETWORK
from benchmarks.record import child, store
from kdx.choices import GeometryName
from kdx.commands import explain
from kdx.commands import plan as planning
from kdx.runs.plan import RunOptions

MODULE = "benchmarks.scale"
RESNET = "kdx:resnet,width=16,depth=2-2-2-2,classes=10,block=basic,stem=imagenet"


@dataclass(frozen=True)
class Case:
    """A student and a base with this network, and one layer. side: of the images. few, many: numbers of images."""

    name: str
    network: str
    layer: str
    side: int
    geometry: GeometryName
    few: int
    many: int


CASES = (
    Case("tiny networks, batch", NETWORK, "layer2", 16, "batch", 1_000, 4_000),
    Case("small ResNet-18, batch", RESNET, "layer4", 96, "batch", 128, 640),
    Case("tiny networks, whole", NETWORK, "layer2", 16, "whole", 600, 2_000),
    Case("small ResNet-18, whole", RESNET, "layer4", 96, "whole", 512, 1_536),
)


def write_case(folder: Path, case: Case) -> None:
    """The images of both parts, and the models file."""
    generator = np.random.default_rng(0)
    for name, images in (("few", case.few), ("many", case.many)):
        levels = generator.integers(0, 256, (images, case.side, case.side), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=levels, labels=np.arange(images) % 10)
    (folder / "models.toml").write_text(f'student = "{case.network}"\nbase = "{case.network}"\nlayers = ["{case.layer}"]\n')


def part(folder: Path, case: Case, name: str) -> dict[str, Any]:
    """One run or one plan of a part of the images."""
    kind, data = name.split()
    options = RunOptions(geometry=case.geometry, runtime="eager", device="cpu", gallery=4, workers=1, split="all")
    start = time.process_time()
    if kind == "run":
        explain.run(str(folder / f"{data}.npz"), folder / "models.toml", folder / f"run-{data}", (), options)
        return {"seconds": time.process_time() - start}
    estimate = planning.run(
        str(folder / "few.npz"), folder / "models.toml", (), options, images=getattr(case, data), clock=time.process_time
    )
    return {"seconds": estimate.total, "stages": dict(estimate.seconds), "disk": estimate.work.disk(case.geometry)}


def measure(case: Case) -> dict[str, Any]:
    """The seconds of the additional images, estimated and measured."""
    with tempfile.TemporaryDirectory() as name:
        write_case(Path(name), case)
        parts = {
            label: child(MODULE, "--case", json.dumps(asdict(case)), "--folder", name, "--part", label)
            for label in ("plan few", "plan many", "run few", "run many")
        }
    estimated, measured = (parts[f"{kind} many"]["seconds"] - parts[f"{kind} few"]["seconds"] for kind in ("plan", "run"))
    return {**asdict(case), "parts": parts, "estimated": estimated, "measured": measured, "ratio": estimated / measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help=argparse.SUPPRESS)  # for the fresh processes
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(sys.stderr):
            result = part(options.folder, Case(**json.loads(options.case)), options.part)
        print(json.dumps(result))
        return
    rows = []
    for case in CASES:
        rows.append(measure(case))
        store("scale", MODULE, {"cases": rows})
    table = Table("case", "additional images", "estimated", "measured", "ratio", box=None)
    for row in rows:
        seconds = (f"{row[name]:.1f} s" for name in ("estimated", "measured"))
        table.add_row(row["name"], f"{row['many'] - row['few']:,}", *seconds, f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
