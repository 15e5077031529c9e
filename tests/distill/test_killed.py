"""A training that is killed within an epoch, and resumed, ends with the weights of one that is not."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdx.distill import TrainingSettings, distill
from kdx.distill.seeding import deterministic, random_state, seeded, set_random_state
from tests.distill.small import TEACHER

ROOT = Path(__file__).parents[2]

SETTINGS = TrainingSettings(
    epochs=2, batch=30, image_size=(8, 8), optimizer="adamw", learning_rate=0.01, ema=0.9, augment=True, flip=True, accumulate=2,
    student_images=300, clip=2.0, save_minutes=0,
)  # fmt: skip
OPTIONS = (
    "--epochs 2 --batch 30 --image-size 8 --optimizer adamw --lr 0.01 --ema 0.9 --augment --flip --accumulate 2 --student-images 300 "
    "--clip 2 --save-minutes 0 --device cpu"
)


class Dropping(nn.Module):
    """A network whose training uses every global generator of random numbers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images)
        if self.training:
            features = features * (1 + random.random() / 4 + np.random.rand() / 4)  # noqa: NPY002
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


def within_an_epoch(path: Path) -> bool:
    """Whether the state in this file is within an epoch."""
    return path.exists() and torch.load(path, weights_only=True)["step"] > 0


def run_and_kill(arguments: list[str], state: Path) -> None:
    """Start kdx, and kill it when its state file is within an epoch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdx", *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
    )
    try:
        while process.poll() is None:
            time.sleep(0.01)
            if state.exists():
                process.send_signal(signal.SIGSTOP)  # the file cannot change between the look and the end
                if within_an_epoch(state):
                    return
                process.send_signal(signal.SIGCONT)
        assert process.stderr is not None
        raise AssertionError(f"the run ended by itself: {process.stderr.read().decode()}")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot stop a process and let it go on")
def test_a_killed_run_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    networks: dict[str, Any] = {"teacher": f"{TEACHER}@{finished / 'teacher.safetensors'}", "student": "tests.distill.test_killed:Dropping"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["distill", "digits", *OPTIONS.split(), "--out", str(killed)]
    run_and_kill([*arguments, "--teacher", networks["teacher"], "--student", networks["student"]], killed / "student.state.pt")
    assert not (killed / "student.safetensors").exists()
    for out in (whole, killed):
        distill("digits", **networks, out=out, settings=SETTINGS, device="cpu", report=lambda result: None)
    for name in ("base.safetensors", "student.safetensors", "models.toml"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_random_states_are_restored() -> None:
    def numbers() -> list[float]:
        drawn = [random.random(), np.random.rand(), float(torch.rand(())), generator.random()]  # noqa: NPY002
        return [*drawn, random.gauss(), np.random.randn(), float(torch.randn(()))]  # noqa: NPY002

    device, generator = torch.device("cpu"), np.random.default_rng(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    with seeded(device, 1, 2):
        first = numbers()
        file = io.BytesIO()
        torch.save(random_state(device, generator), file)
        second = numbers()
        file.seek(0)
        set_random_state(device, generator, torch.load(file, weights_only=True))
        assert numbers() == second != first
    generator = np.random.default_rng(3)
    with seeded(device, 1, 2):
        assert numbers() == first
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    assert after[:2] == before[:2] and torch.equal(after[2], before[2])


@pytest.mark.parametrize(("before", "warn_only"), [(False, False), (True, False), (True, True)])
def test_on_a_gpu_the_algorithms_are_deterministic_and_the_callers_settings_return(
    monkeypatch: pytest.MonkeyPatch, before: bool, warn_only: bool
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    try:
        with suppress(ZeroDivisionError), deterministic(torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.backends.cudnn.benchmark and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise ZeroDivisionError
        after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        assert after == (before, warn_only) and torch.backends.cudnn.benchmark
        with deterministic(torch.device("cpu")):
            assert torch.are_deterministic_algorithms_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)
