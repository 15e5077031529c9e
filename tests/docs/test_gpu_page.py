"""docs/gpu.md lists the extras for GPUs, and the extras are consistent."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
ON_GPUS = ("gpu", "gpu-cu12", "tensorrt", "tensorrt-rtx", "pycuda", "nvidia")


def packages(extra: str) -> set[str]:
    return {re.split(r"[\[<>=;]", requirement)[0].strip() for requirement in EXTRAS[extra]}


def test_the_page_lists_the_extras_for_gpus() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    rows = dict(re.findall(r"^\| `kdx\[([a-z0-9-]+)\]` \| ([^|]+) \|", text, re.MULTILINE))
    assert tuple(rows) == ON_GPUS and set(ON_GPUS) <= set(EXTRAS)
    assert set(re.findall(r"`([a-z-]+)`", rows["gpu"])) == packages("gpu") == packages("gpu-cu12")


def test_no_extra_installs_both_builds_of_onnx_runtime() -> None:
    """They are one package under two names, and installing the second overwrites files of the first."""
    assert all(not {"onnxruntime", "onnxruntime-gpu"} <= packages(extra) for extra in EXTRAS)


def test_all_of_nvidia_is_in_one_extra() -> None:
    (requirement,) = EXTRAS["nvidia"]
    assert set(re.findall(r"[a-z0-9-]+", requirement.removeprefix("kdx"))) == set(ON_GPUS) - {"gpu-cu12", "nvidia"}


def test_the_bounds_are_those_of_the_cuda_versions() -> None:
    """ONNX Runtime 1.26 is the last for CUDA 12, and 1.24 is the first that reports where a node runs."""
    assert "onnxruntime-gpu>=1.27" in EXTRAS["gpu"] and "onnxruntime-gpu>=1.24,<1.27" in EXTRAS["gpu-cu12"]
    assert any(requirement.startswith("cuda-bindings>=13") for requirement in EXTRAS["gpu"])
    assert any(requirement.endswith(",<13") for requirement in EXTRAS["gpu-cu12"])
