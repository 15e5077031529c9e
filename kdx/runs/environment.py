"""The machine and the packages of a run."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("kdx", "torch", "numpy", "scipy", "onnx", "onnxruntime", "openvino", "zarr", "pyarrow", "pillow")


def environment() -> dict[str, Any]:
    """Python, platform, processor, the versions of the installed packages, the number of threads, and the GPU if there is one."""
    entries: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "processor": _processor()}
    for package in _PACKAGES:
        try:
            entries[package] = version(package)
        except PackageNotFoundError:
            continue
    entries["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        entries["gpu"] = torch.cuda.get_device_name()
    return entries


def _processor() -> str:
    """The name of the processor. Python's platform module does not return it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def now() -> str:
    """The local time, in ISO 8601 with seconds and the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
