"""Training with several processes through Hugging Face Accelerate."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdx.distill import EpochResult, TrainingSettings, distill
from kdx.distill.processes import SINGLE, Processes
from kdx.errors import KdxError

ROOT = Path(__file__).parents[2]
SETTINGS = TrainingSettings(epochs=2, batch=20, image_size=(8, 8), augment=True, flip=True, student_images=90, save_minutes=0, clip=3.0)
NETWORK = "tests.distill.test_processes:Plain"

PROGRAM = """
import atexit, glob, json, os, sys, time
from contextlib import suppress
from pathlib import Path
from tests.distill.test_processes import NETWORK, settings_for
from kdx.distill import distill, loop

def gloo_threads():
    names = []
    for task in glob.glob("/proc/self/task/*/comm"):
        with suppress(OSError):  # a thread that has just ended
            names.append(Path(task).read_text())
    return [name for name in names if "gloo" in name]

def report_threads():
    deadline = time.monotonic() + 5  # a thread that has been joined can be listed for a moment
    while gloo_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.write(1, f"threads at the end: {gloo_threads()}\\n".encode())  # in one piece, because both processes write

atexit.register(report_threads)  # after all that kdx registers later
save = loop._Run._save

def save_and_stop(run, epoch, place):
    save(run, epoch, place)
    if run.training.role == "student" and (epoch, place["step"]) == (1, 1):
        os._exit(3)

if sys.argv[3:] == ["stop"]:
    loop._Run._save = save_and_stop
results = []
distill("digits", teacher=NETWORK, student=NETWORK, out=sys.argv[1], settings=settings_for(sys.argv[2]), device="cpu",
        layers=["features"], report=lambda r: results.append([r.network, r.epoch, r.loss, r.accuracy, r.entropy]))
assert gloo_threads() or not sys.platform.startswith("linux")
if results:
    print(json.dumps(results))
"""


class Plain(nn.Module):
    """Without batch normalisation, whose statistics depend on the processes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh())
        self.head = nn.Linear(36, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(images).flatten(1))
        return logits


def settings_for(name: str) -> TrainingSettings:
    """The settings of a test, by name: a method, and ``+`` for accumulation and an average of the weights."""
    settings = replace(SETTINGS, method=name.rstrip("+"))
    return replace(settings, accumulate=2, ema=0.7) if name.endswith("+") else settings


def launch(out: Path, *arguments: str, status: int = 0) -> list[list[float | str]]:
    """The epochs that PROGRAM reports in two processes."""
    pytest.importorskip("accelerate")
    script = out.parent / "program.py"
    script.write_text(PROGRAM)
    # --multi_gpu starts the processes with torchrun, also on a machine without a GPU; --cpu would need MPI.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    process = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0", str(script), str(out), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (process.returncode == 0) == (status == 0), process.stderr[:3000]
    lines = [line for line in process.stdout.splitlines() if line.startswith("[[")]
    assert len(lines) == (status == 0)  # only the first process reports
    ends = re.findall(r"threads at the end: \[[^]]*\]", process.stdout)
    assert ends == ["threads at the end: []"] * (2 * (status == 0)), process.stdout  # such a thread aborts an interpreter that ends
    return [epoch for line in lines for epoch in json.loads(line)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("kd+", marks=pytest.mark.exhaustive), "at"])
def test_two_processes_train_as_one_does(tmp_path: Path, name: str) -> None:
    results: list[EpochResult] = []
    one, two = tmp_path / "one", tmp_path / "two"
    distill(
        "digits", teacher=NETWORK, student=NETWORK, out=one, settings=settings_for(name), layers=["features"], device="cpu",
        report=results.append,
    )  # fmt: skip
    epochs = launch(two, name)
    assert len(epochs) == 6
    for result, (network, epoch, loss, accuracy, entropy) in zip(results, epochs, strict=True):
        assert (result.network, result.epoch, result.accuracy) == (network, epoch, accuracy)
        assert (result.loss, result.entropy) == pytest.approx((loss, entropy), rel=1e-4)
    for role in ("teacher", "base", "student"):
        expected, actual = (load_file(out / f"{role}.safetensors") for out in (one, two))
        for key, tensor in expected.items():
            torch.testing.assert_close(actual[key], tensor, rtol=1e-3, atol=1e-5)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    with pytest.raises(KdxError, match="processes differ"):
        distill("digits", teacher=NETWORK, student=NETWORK, out=two, settings=settings_for(name), layers=["features"], device="cpu")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_that_stop_within_an_epoch_go_on_as_if_they_had_not(tmp_path: Path) -> None:
    launch(tmp_path / "whole", "kd+")
    launch(tmp_path / "parts", "kd+", "stop", status=3)
    assert torch.load(tmp_path / "parts" / "student.state.pt", weights_only=True)["step"] == 1
    assert [epoch[:2] for epoch in launch(tmp_path / "parts", "kd+")] == [["teacher", 2], ["base", 2], ["student", 2]]
    for name in ("student.safetensors", "models.toml"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_several_processes_without_accelerate_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert Processes.of_environment("cpu") == (SINGLE, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KdxError, match=r"accelerate, which is not installed.*\n.*kdx\[distill\]"):
        Processes.of_environment("cpu")


def test_one_process_needs_no_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "accelerate"] or ["accelerate"]:
        monkeypatch.setitem(sys.modules, name, None)
    distill("digits", teacher=NETWORK, student=NETWORK, out=tmp_path, settings=replace(SETTINGS, epochs=1), device="cpu")
    assert (tmp_path / "models.toml").is_file()
