"""Shared by all benchmarks: ratios, fresh processes, and records that name the machine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.runs.environment import environment
from kdx.runs.environment import peak_bytes as peak_bytes

RESULTS = Path(__file__).parent / "results"


def ratio(samples: Mapping[str, list[float]], numerator: str, denominator: str) -> list[float]:
    """Quartiles of the ratio of two variants' times, taken round by round."""
    return quartiles(np.array(samples[numerator]) / np.array(samples[denominator]))


def quartiles(values: NDArray[np.float64] | list[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]


def child(module: str, *arguments: str) -> Any:
    """The JSON that a benchmark's module prints in a fresh process, which inherits no memory and no warm caches from this one."""
    command = [sys.executable, "-m", module, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def origin(module: str) -> dict[str, Any]:
    """The origin of a benchmark's figures: the command, the commit, and the machine with its versions.

    The commit ends in ``-dirty`` if the code has uncommitted changes, and is empty without git or outside a repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        if git("status", "--porcelain", "--untracked-files=no", "--", "kdx", "export", "kernels", "benchmarks", ":!benchmarks/results"):
            commit += "-dirty"
    except FileNotFoundError:
        commit = ""
    return {"command": shlex.join(["python", "-m", module, *sys.argv[1:]]), "commit": commit, "environment": environment()}


def store(name: str, module: str, measurement: Mapping[str, Any]) -> dict[str, Any]:
    """Write a benchmark's record to results/NAME.json and return it."""
    record = {**origin(module), **measurement}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record
