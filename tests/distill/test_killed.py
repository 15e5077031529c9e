"""A training that is killed within an epoch, and resumed, ends with the weights of one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdx.distill.seeding import random_state, seeded, set_random_state

OPTIONS = (
    "distill digits --teacher kdx:resnet,width=2,depth=1,stages=2@{teacher} --student {student} --method {method} "
    "--image-size 8 --epochs 2 --batch 24 --optimizer adamw --lr 0.01 --ema 0.9 --augment --flip --accumulate 2 --device cpu"
)


class Dropping(nn.Module):
    """A network whose training uses every global generator of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        import random

        import numpy as np

        features = self.features(images)
        if self.training:
            features = features * (1 + random.random() / 4 + np.random.rand() / 4)  # noqa: NPY002
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


def command(out: Path, teacher: Path, method: str, *options: str) -> list[str]:
    text = OPTIONS.format(teacher=teacher, method=method, student="py:tests.distill.test_killed:Dropping")
    return [sys.executable, "-m", "kdx", *text.split(), "--out", str(out), *options]


def mid_epoch(path: Path) -> dict[str, Any] | None:
    """The state in the file if it is within an epoch."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except FileNotFoundError:
        return None
    return state if state["step"] else None


def run_and_kill(arguments: list[str], state: Path) -> dict[str, Any]:
    """Start kdx, and kill it when its state file is within an epoch; the state then."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while process.poll() is None:
            time.sleep(0.02)
            if mid_epoch(state) is not None:
                process.send_signal(signal.SIGSTOP)  # what is in the file cannot change between the look and the end
                found = mid_epoch(state)
                if found is not None:
                    return found
                process.send_signal(signal.SIGCONT)
        raise AssertionError(f"not within an epoch: {process.stderr.read().decode() if process.stderr else ''}")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("method", ["kd", "at"])
def test_a_killed_run_ends_with_the_same_weights(finished: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("fcntl")  # POSIX signals
