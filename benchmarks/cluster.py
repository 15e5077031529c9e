"""Compares `kdx explain` in one process with workers of Ray on this machine: ``python -m benchmarks.cluster [--images N] [--side PIXELS]``.

Each command runs with one thread per process. The table has the elapsed time and the CPU seconds of the driver, of the workers and of Ray's
own processes, as the system counts them. If other programs use the machine, compare the CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from kdx.export.graphs import Preprocessing
from kdx.models import models_file
from kdx.models.resnet import resnet

_INTERVAL = 0.2
"""Seconds between two readings of the CPU times. The time that a process uses after its last reading is not counted."""

CASES = {
    "1 process": (),
    "1 worker": ("--cluster", "local"),
    "2 workers": ("--cluster", "local"),
}


def write_case(folder: Path, images: int, side: int) -> None:
    """Images of noise and three networks with random weights. The work of a run does not depend on their values."""
    random = np.random.default_rng(0)
    np.savez(folder / "data.npz", images=random.integers(0, 256, (images, side, side, 3), dtype=np.uint8), labels=np.arange(images) % 10)
    for role, width in (("teacher", 32), ("base", 16), ("student", 16)):
        save_file(resnet(width=width, depth=2, classes=10).state_dict(), folder / f"{role}.safetensors")
    models_file.write_models(
        folder / "models.toml",
        teacher="kdx:resnet,width=32,depth=2,classes=10@teacher.safetensors",
        base="kdx:resnet,width=16,depth=2,classes=10@base.safetensors",
        student="kdx:resnet,width=16,depth=2,classes=10@student.safetensors",
        layers=("layer2", "layer3"),
        classes=tuple(map(str, range(10))),
        preprocessing=Preprocessing((side, side), (0.5,), (0.5,)),
    )


def measured(command: list[str], cores: int) -> tuple[float, dict[str, float]]:
    """The elapsed seconds of a command, and the CPU seconds of its processes by their role."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds: dict[int, tuple[str, float]] = {}
    start = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, preexec_fn=lambda: _use(cores)) as process:
        while process.poll() is None:
            for pid, (part, value) in _tree(process.pid).items():  # a process that has ended does not have its name any more
                seconds[pid] = ("workers" if seconds.get(pid, ("",))[0] == "workers" else part, value)
            time.sleep(_INTERVAL)
    elapsed = time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    sums: dict[str, float] = {}
    for part, value in seconds.values():
        sums[part] = sums.get(part, 0.0) + value
    return elapsed, sums


def _use(cores: int) -> None:
    """Limit this process and its children to some of the cores. Ray then has one worker per core."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def _tree(root: int) -> dict[int, tuple[str, float]]:
    """The part and the CPU seconds of a process and of its descendants."""
    parents, used = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    result = {}
    for pid in used:
        ancestor = pid
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root:
            result[pid] = ("driver" if pid == root else _part(pid), used[pid])
    return result


def _part(pid: int) -> str:
    try:
        return "workers" if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Worker") else "Ray"
    except OSError:
        return "Ray"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--geometry", default="batch")
    arguments = parser.parse_args()
    print("| | elapsed s | driver CPU s | workers CPU s | Ray CPU s |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_case(folder, arguments.images, arguments.side)
        for number, (case, options) in enumerate(CASES.items()):
            command = [sys.executable, "-m", "kdx", "explain", str(folder / "data.npz"), "--models", str(folder / "models.toml")]
            command += ["--out", str(folder / f"run{number}"), "--geometry", arguments.geometry, "--runtime", "eager", "--split", "all"]
            elapsed, cpu = measured([*command, "--permutations", "99", *options], 2 if case == "2 workers" else 1)
            parts = " | ".join(f"{cpu.get(part, 0.0):.1f}" for part in ("driver", "workers", "Ray"))
            print(f"| {case} | {elapsed:.1f} | {parts} |", flush=True)


if __name__ == "__main__":
    main()
