"""A training that fails for a reason outside its settings stops with one error, and what it has stored stays usable."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdx import models
from kdx.disk import lock_file
from kdx.distill import EpochResult, distill
from kdx.errors import KdxError
from tests.distill.small import QUICK, STUDENT, TEACHER, files_of_at_most

ROOT = Path(__file__).parents[2]


class BreaksDown(torch.autograd.Function):
    """The identity, whose gradient is infinite in one step."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        Breaking.steps += 1
        return gradient * (math.inf if Breaking.steps == Breaking.last else 1)


class Breaking(nn.Module):
    """A network whose gradient breaks down in one step, counted over all networks."""

    steps = 0
    last = 0

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.convolution(images).relu().mean((2, 3))
        if self.training and torch.is_grad_enabled():
            features = BreaksDown.apply(features)  # type: ignore[no-untyped-call]
        logits: Tensor = self.head(features)
        return logits


def silent(_result: EpochResult) -> None:
    pass


def arguments(finished: Path, out: Path, **settings: Any) -> dict[str, Any]:
    teacher = f"{TEACHER}@{finished / 'teacher.safetensors'}"
    return {"teacher": teacher, "student": STUDENT, "out": out, "settings": replace(QUICK, **settings), "report": silent}


MORE = [pytest.param(settings, marks=pytest.mark.slow) for settings in ({"clip": 1.0}, {"ema": 0.5}, {"precision": "bfloat16"})]


@pytest.mark.parametrize("settings", [{}, {"save_minutes": 0.0}, *MORE])
def test_a_gradient_that_is_not_finite_stops_the_training(finished: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """2 steps per epoch: the gradient of the third is infinite, and the loss of the fourth, or the weights before, show it."""
    if settings.get("precision") == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not compute in bfloat16")
    Breaking.steps, Breaking.last = 0, 3
    with pytest.raises(KdxError, match=r"The training of the base diverged in epoch 2 at step [12]: .* is nan.") as caught:
        distill("digits", **arguments(finished, tmp_path, **settings) | {"student": f"{__name__}:Breaking"})
    weights = str(caught.value.hint).removesuffix(".").rpartition(" are ")[2]
    assert weights == f"{tmp_path / 'base.state.pt'}#best" and "epoch 1, the best until then" in caught.value.hint
    network = models.load(f"{__name__}:Breaking@{weights}").module
    assert all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters())
    state = torch.load(tmp_path / "base.state.pt", weights_only=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["model"].values())  # also what the training would resume from
    assert state["epoch"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("size", [pytest.param(3000, marks=pytest.mark.slow), 10_000])
def test_a_full_disk_leaves_nothing_half_written_and_the_run_resumes(finished: Path, tmp_path: Path, size: int) -> None:
    """The smaller limit prevents the teacher's weights, the larger one the state of the first epoch of the base."""
    with files_of_at_most(size), pytest.raises(KdxError, match=rf"^{tmp_path}/[a-z]+\.(safetensors|state\.pt) cannot be written: "):
        distill("digits", **arguments(finished, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", *(["teacher.safetensors"] if size == 10_000 else [])}
    distill("digits", **arguments(finished, tmp_path))
    for name in ("base", "student"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (finished / f"{name}.safetensors").read_bytes()


def test_a_folder_that_cannot_be_written_is_an_error(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(KdxError, match="file cannot be written: File exists"):
        distill("digits", **arguments(finished, file))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl")
def test_a_second_training_in_the_same_folder_is_refused(finished: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(_result: EpochResult) -> None:
        if not refused:
            with pytest.raises(KdxError, match="Another process is writing the run in") as caught:
                distill("digits", **arguments(finished, tmp_path))
            refused.append(str(caught.value))

    distill("digits", **arguments(finished, tmp_path) | {"report": second})
    assert refused
    distill("digits", **arguments(finished, tmp_path))  # free again
    code = (
        "import sys, pathlib, time; from kdx.disk import lock_file; lock = lock_file(pathlib.Path(sys.argv[1]), wait=False); "
        "print(); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(KdxError, match="Another process"):
            distill("digits", **arguments(finished, tmp_path))
        process.kill()
    lock_file(tmp_path / ".lock", wait=False).close()  # the lock has ended with its process


INTERRUPTED = """
import atexit, os, signal, sys, time, typer
from kdx import cli, errors
from kdx.cli import commands

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

def work(signals: str) -> None:
    atexit.register(lambda: [os.kill(os.getpid(), getattr(signal, name)) for name in signals.split(",")])
    with errors.resumable(lambda: True):
        try:
            for name in signals.split(","):
                os.kill(os.getpid(), getattr(signal, name))
            time.sleep(60)
        finally:
            for name in signals.split(","):
                os.kill(os.getpid(), getattr(signal, name))

commands.app.command()(work)
sys.argv[1:] = ["work", sys.argv[1]]
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("signals", ["SIGINT", "SIGTERM", "SIGINT,SIGTERM"])
def test_signals_end_the_command_with_one_line(signals: str) -> None:
    """Also those that arrive while the first is handled or the process ends."""
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, signals], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (130, "Stopped. Run the same command again to resume.\n")
