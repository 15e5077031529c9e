"""Whole processes: from their start to the first maps, and the start of the command line and of `import kdx` alone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import explain
from benchmarks.comparison import Comparison, Run, Unavailable, Variant

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

COMMANDS = {"kdx --version": 0, "kdx --help": 0, "kdx explain --no-such-option": 2}
"""Commands that compute nothing, and their exit status. The last one is an argument error."""

IMPORTS = ("import torch", "import kdx", "import kdx; kdx.unicam")
"""Code that only imports. The last one also uses kdx for the first time."""


def first_maps(folder: Path, *, network: str, layer: str, batch: int, side: int) -> Comparison:
    """A new process that imports, loads two networks and explains one batch."""

    def process(code: str) -> None:
        arguments = [str(folder), layer, str(batch), str(side), network]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=Path(__file__).parents[1])

    return Comparison(
        {"published": lambda _: lambda: process(_PYTORCH), "kdx": lambda _: lambda: process(_KDX)},
        work=lambda: explain.work(network, layer, batch, side),
    )


def process_start(folder: Path) -> Comparison:
    """New processes that only start: commands that compute nothing, and imports.

    They run in ``folder``, which is empty, so that they import the installed kdx.
    """

    def process(command: list[str]) -> dict[str, Any]:
        completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return {"status": completed.returncode, "output": completed.stdout, "errors": completed.stderr}

    def command(line: str) -> Variant:
        def opened(_: ExitStack) -> Run:
            program = Path(sysconfig.get_path("scripts")) / "kdx"
            if not program.exists():
                raise Unavailable("The command kdx is not installed beside this Python.")
            return lambda: process([str(program), *line.split()[1:]])

        return opened

    def code(text: str) -> Variant:
        return lambda _: lambda: process([sys.executable, "-c", text])

    return Comparison({**{line: command(line) for line in COMMANDS}, **{text: code(text) for text in IMPORTS}}, _ended_as_expected)


def _ended_as_expected(results: Mapping[str, Any]) -> dict[str, int]:
    """The exit status of each process. Raises SystemExit with the errors of those that ended with another status than expected."""
    wrong = [
        f"{name} ended with status {result['status']}: {result['errors'].strip()}"
        for name, result in results.items()
        if result["status"] != COMMANDS.get(name, 0)
    ]
    if wrong:
        raise SystemExit("\n".join(wrong))
    return {f"status of {name}": result["status"] for name, result in results.items()}
