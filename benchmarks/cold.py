"""From nothing to the first maps: a new process that imports, loads two networks and explains one batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import explain
from benchmarks.subject import Subject

prepare = explain.prepare

_KDX = """
import sys, torch, kdx
folder, layer, batch, side = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
files = {role: f"{folder}/{role}.onnx" for role in ("student", "base")}
with kdx.Explainer(**files, layers=layer, runtime="onnx") as explainer:
    explainer(torch.rand(batch, 3, side, side), torch.arange(batch) % 4).layers[layer].distilled.scaled((side, side))
"""

_PYTORCH = """
import sys, torch
from benchmarks import eager
from kdx import models
folder, layer, batch, side, network = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
networks = [models.load(f"{network}@{folder}/{role}.safetensors").module for role in ("student", "base")]
target = torch.nn.functional.one_hot(torch.arange(batch) % 4).float()
eager.published(*networks, layer, torch.rand(batch, 3, side, side), target)
"""


def subject(folder: Path, *, network: str, layer: str, batch: int, side: int) -> Subject:
    def process(code: str) -> None:
        arguments = [str(folder), layer, str(batch), str(side), network]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=Path(__file__).parents[1])

    return Subject(
        {"published": lambda _: lambda: process(_PYTORCH), "kdx": lambda _: lambda: process(_KDX)},
        work=lambda: explain.work(network, layer, batch, side),
    )
