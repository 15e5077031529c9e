"""A way of a case in a process of its own, asked for one run after the other.

In one process the ways would change each other's times: a forward pass of PyTorch takes half the time where a way before it has left
memory behind that the C library does not have to ask the system for again.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.record import peak_bytes
from benchmarks.subject import Unavailable, Way

BRIEF = 0.2
"""Seconds that a way runs at least in a round, again and again if need be: the first run after a wait is that of a machine that sleeps."""

WARMER = 2
"""Times that a way runs once more before it is timed."""


class Worker:
    """The parent's side. A context manager, whose process ends with it. Every call raises CalledProcessError where the process failed."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def opened(self) -> str | None:
        """Waits until the way is ready; the reason if it cannot run here."""
        missing: str | None = self._answer()["missing"]
        return missing

    def run(self, keep: Path | None = None) -> dict[str, float]:
        """Runs for `BRIEF` at least: mean ``seconds`` of a run, and the ``peak_bytes`` of the process so far. keep: where to pickle what
        it returned, after one run alone."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{keep or ''}\n")
        self._process.stdin.flush()
        found: dict[str, float] = self._answer()
        return found

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise subprocess.CalledProcessError(self._process.wait(), self._command)
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if error is not None:
            self._process.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(way: Way, answer: Callable[[Any], None]) -> None:
    """The process's side: answers every line of standard input, which is where to pickle the result, or empty."""
    with ExitStack() as held:
        try:
            run = way(held)
        except Unavailable as error:
            answer({"missing": str(error)})
            return
        answer({"missing": None})
        for line in sys.stdin:
            keep = line.strip()
            spent, count = 0.0, 0
            while not count or (spent < BRIEF and not keep):
                start = time.perf_counter()
                result = run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # what a run leaves to a GPU is part of it
                spent, count = spent + time.perf_counter() - start, count + 1
                if keep:
                    Path(keep).write_bytes(pickle.dumps(result))
                del result  # the next run has the memory that this one had
            answer({"seconds": spent / count, "peak_bytes": peak_bytes()})


def paired(seconds: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, a round after the other, every second round in the opposite order. Where there are several rounds, each
    way is warmed up first."""
    if rounds > 1:
        for run in seconds.values():
            for _ in range(WARMER):
                run()
    samples: dict[str, list[float]] = {name: [] for name in seconds}
    for number in range(rounds):
        for name, run in list(seconds.items())[:: 1 if number % 2 == 0 else -1]:
            samples[name].append(run())
    return samples
