"""Runs `kdx` again and again in forked copies of one process that has imported everything, with calls to the disk that fail.

``python -m tests.hostile.forked`` is that process. It loads `disk_calls.c`, reads requests from standard input, a JSON object per line,
and answers each with another one. `Forked` starts it and is what tests use.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 60
"""The time after which a command counts as hung."""


class Fault(IntEnum):
    """A fault at a call that changes the disk. The numbers are those of disk_calls.c."""

    NONE = 0
    DEATH = 1
    """The processes die before the call."""
    DEATH_IN_WRITE = 2
    """The processes die when half of the bytes of a write are written. Only writes are counted."""
    FULL = 3
    """The disk is full from this call on; half of the bytes of a write still fit."""
    READ_ONLY = 4
    """The disk is read-only from this call on."""
    VANISHED = 5
    """The folder is moved away before the call."""


@dataclass(frozen=True)
class Ending:
    """The ending of a command. status: its exit status, or minus the number of the signal. calls, writes: those that changed the disk."""

    status: int
    calls: int
    writes: int
    output: str
    seconds: float


class Forked:
    """The process that forks. A context manager."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "LD_PRELOAD": str(_library()), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.hostile.forked"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self,
        command: Sequence[object],
        folder: Path,
        fault: Fault = Fault.NONE,
        at: int = 0,
        *,
        kill_after: float | None = None,
        vanish_after: float | None = None,
        clock: bool = False,
        current: Path = ROOT,
    ) -> Ending:
        """``kdx COMMAND`` with a fault at a call that changes the disk below ``folder``. at: the number of the call, from 1.

        current: the current folder. kill_after: seconds after which the process is killed. vanish_after: seconds after which the folder is
        moved away. clock: whether the clock goes back by an hour at every reading.
        """
        request = {
            **{"command": [*map(str, command)], "folder": str(folder), "current": str(current)},
            **{"fault": fault, "at": at, "kill_after": kill_after, "vanish_after": vanish_after, "clock": clock},
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ending(**json.loads(self._process.stdout.readline()))


@functools.cache
def _library() -> Path:
    """The compiled disk_calls.c."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    out = Path(tempfile.mkdtemp()) / "disk_calls.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", out, Path(__file__).with_name("disk_calls.c"), "-ldl"], check=True)
    return out


def _serve() -> None:
    shim = ctypes.CDLL(None)
    shim.hostile_calls.restype = shim.hostile_writes.restype = ctypes.c_long
    import_module("kdx.commands.explain")
    import_module("tests.command_line")
    gc.disable()  # short processes; a collection would copy the memory that they share
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_answer(shim, json.loads(line))), file=answers, flush=True)


def _answer(shim: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in a forked process, and import the modules that it imported, so that the next ones have them."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        output, modules = Path(name, "output"), Path(name, "modules")
        child = os.fork()
        if not child:
            _perform(shim, request, output, modules)
        status = _wait(child, request)
        if modules.exists():
            for module in modules.read_text().split("\n"):
                if module not in sys.modules:
                    try:
                        import_module(module)
                    except Exception:  # a module that only another one can import
                        continue
        return {
            "status": os.waitstatus_to_exitcode(status),
            "calls": shim.hostile_calls(),
            "writes": shim.hostile_writes(),
            "output": output.read_text() if output.exists() else "",
            "seconds": time.monotonic() - start,
        }


def _wait(child: int, request: dict[str, Any]) -> int:
    """The status of a process, which is killed if it takes too long."""
    start = time.monotonic()
    end, vanish = start + (request["kill_after"] or SECONDS), start + (request["vanish_after"] or SECONDS)
    while time.monotonic() < end:
        if time.monotonic() >= vanish and Path(request["folder"]).is_dir():
            Path(request["folder"]).rename(request["folder"] + ".gone")
            vanish = end
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return status
        time.sleep(0.001)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _perform(shim: Any, request: dict[str, Any], output: Path, modules: Path) -> None:
    """Run the command in this forked process, and end it."""
    status = 70
    try:
        os.setpgid(0, 0)
        os.chdir(request["current"])
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        from kdx.study import workers
        from tests.command_line import status_of

        workers._CONTEXT = multiprocessing.get_context("fork")  # type: ignore[assignment] # spawned ones would import everything again
        if request["clock"]:
            _let_the_clock_jump()
        shim.hostile_arm(request["folder"].encode(), request["fault"], ctypes.c_long(request["at"]))
        status = status_of(*request["command"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if request["fault"] == Fault.NONE:
            modules.write_text("\n".join(sys.modules))
        os._exit(status)


def _let_the_clock_jump() -> None:
    """At every reading the clock goes back by an hour."""
    start, looks = time.time(), iter(range(1, 1_000_000))
    time.time = lambda: start - 3600 * next(looks)


if __name__ == "__main__":
    _serve()
