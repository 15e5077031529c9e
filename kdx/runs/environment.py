"""The machine and the packages of a run."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")

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


def peak_bytes() -> int:
    """The peak memory of this process. On Linux getrusage starts from the parent's peak, so the process's status is read instead."""
    if _STATUS.exists():
        return 1024 * int(_STATUS.read_text().split("VmHWM:")[1].split()[0])
    import resource  # Windows does not have it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def now() -> str:
    """The local time, in ISO 8601 with seconds and the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
