"""Tiny inputs, the commands that run on them, and the files that they leave."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from kdx.export.graphs import Preprocessing
from kdx.models import models_file
from kdx.models.resnet import resnet
from tests.hostile.forked import Ending, Fault, Forked

CLASSES = ("cat", "dog")
NETWORK = "kdx:resnet,width=2,depth=1,stages=2"

_EXPLAIN = ("explain", "pictures", "--models", "models.toml", "--out", "run", "--runtime", "eager", "--permutations", "5", "--gallery", "2")

_STUDY = """
methods = ["kd"]
seeds = 1
[data]
digits = "sample:200:digits"
[teachers]
large = "kdx:resnet,width=3,depth=1,stages=2"
[students]
tiny = "kdx:resnet,width=4,depth=1,stages=2"
[training]
epochs = 1
image_size = 8
[explain]
permutations = 5
gallery = 1
runtime = "eager"
"""

COMMANDS: dict[str, tuple[str, ...]] = {
    "explain, batch": (*_EXPLAIN, "--geometry", "batch", "--batch", "8"),
    "explain, reference": (*_EXPLAIN, "--geometry", "reference", "--reference", "6", "--batch", "8"),
    "explain, whole": (*_EXPLAIN, "--geometry", "whole", "--batch", "8"),
    "distill": (
        *("distill", "sample:60:digits", "--teacher", "kdx:resnet,width=3,depth=1,stages=2", "--student", NETWORK, "--out", "run"),
        *("--epochs", "2", "--teacher-epochs", "1", "--image-size", "8", "--save-minutes", "0", "--device", "cpu"),
    ),
    "study": ("study", "study.toml", "--out", "run", "--workers", "1"),
    "export": ("export", "kdx:resnet,width=2,depth=1,classes=2@student.safetensors", "--layer", "layer2", "--out", "run/student.onnx"),
}
"""One command of each kind, for the folder of `write_inputs`. It writes its files into the folder ``run``."""


def write_inputs(folder: Path) -> None:
    """Two networks with a models file, 16 pictures of two classes, and a study."""
    for seed, role in enumerate(("student", "base")):
        torch.manual_seed(seed)
        save_file(resnet(width=2, depth=1, classes=2).state_dict(), folder / f"{role}.safetensors")
    models_file.write_models(
        folder / "models.toml",
        base="kdx:resnet,width=2,depth=1,classes=2@base.safetensors",
        student="kdx:resnet,width=2,depth=1,classes=2@student.safetensors",
        layers=("layer2",),
        classes=CLASSES,
        preprocessing=Preprocessing((8, 8), (0.5,), (0.5,)),
    )
    rng = np.random.default_rng(0)
    for number in range(16):
        class_folder = folder / "pictures" / CLASSES[number % 2]
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(class_folder / f"{number}.png")
    (folder / "study.toml").write_text(_STUDY)


_TIMES = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+0000|(?<=seconds\": )[\d.e-]+")


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their relative paths, without times and lock files."""
    return {
        str(path.relative_to(folder)): _TIMES.sub(b"", path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


@dataclass
class Subject:
    """A command and its folder. Each run is in the same folder, so that its files name the same paths."""

    forked: Forked
    folder: Path
    command: tuple[str, ...]

    def run(self, fault: Fault = Fault.NONE, at: int = 0, **settings: Any) -> Ending:
        return self.forked.run(self.command, self.folder / "run", fault, at, current=self.folder, **settings)

    def clear(self) -> None:
        for name in ("run", "run.gone"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def complete(self) -> dict[str, bytes]:
        """The files after the command was run until it was complete."""
        ending = self.run()
        assert ending.status == 0, ending.output
        return contents(self.folder / "run")


def differences(actual: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """The names of the files that differ."""
    return sorted(name for name in {*actual, *expected} if actual.get(name) != expected.get(name))


def problems_of(ending: Ending) -> list[str]:
    """The problem with the ending of a command after a fault. It must succeed or print an error of two sentences."""
    if ending.status == 0:
        return []
    lines = ending.output.strip().splitlines()
    is_clear = ending.status in (2, 130) and "Traceback" not in ending.output and any(line.startswith("Error: ") for line in lines)
    return [] if is_clear else [json.dumps({"status": ending.status, "output": ending.output[-1500:]})]
