"""Runs with the processes of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kdx.choices import GeometryName
from kdx.commands import explain
from kdx.kernels import ambient
from tests.cluster.test_ray import bytes_of
from tests.runs.conftest import folder as folder
from tests.runs.small_run import OPTIONS

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, out: Path, geometry: str, data: str = "pictures") -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdx", "explain"]
    run = [str(folder / data), "--models", str(folder / "models.toml"), "--out", str(out), "--batch", "9", "--permutations", "19"]
    options = ["--runtime", "eager", "--seed", "3", "--gallery", "6", "--geometry", geometry]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launch, *run, *options], capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["batch", pytest.param("whole", marks=pytest.mark.exhaustive)])
def test_two_processes_write_the_bytes_of_one(folder: Path, tmp_path: Path, geometry: GeometryName) -> None:
    with ambient.torch_threads(1):
        options = replace(OPTIONS, geometry=geometry)
        explain.run(str(folder / "pictures"), folder / "models.toml", tmp_path / "one", (), options, announce=lambda line: None)
    result = torchrun(folder, tmp_path / "two", geometry)
    assert result.returncode == 0, result.stderr
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    assert result.stdout.count("The page:") == 1, "only the first process prints"


@pytest.mark.slow
def test_an_error_of_the_user_ends_all_processes(folder: Path, tmp_path: Path) -> None:
    result = torchrun(folder, tmp_path / "run", "batch", "nothing")
    assert result.returncode != 0
    assert result.stderr.count("There is no folder") == 1
