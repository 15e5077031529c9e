"""Run each variant of a case in a process of its own, one run at a time.

In one process the variants would change each other's times: a forward pass of PyTorch takes half the time if an earlier variant has left
memory behind that the C library does not have to request from the system again.
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

from benchmarks.comparison import Run
from benchmarks.record import peak_bytes

MINIMUM_SECONDS = 0.2
"""A variant runs at least this long in a round, repeatedly if necessary: the first run after a pause meets a machine that sleeps."""

REST_SECONDS = 0.05
"""How long a variant waits before each round: OpenMP's threads of the variant before it spin for some milliseconds after their work."""

WARM_UP_RUNS = 2


class Worker:
    """The parent's side of a variant's process. It is a context manager, and the process ends with it.

    Every call raises CalledProcessError if the process failed.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def opened(self) -> str | None:
        """Wait until the variant is ready. Returns None, or the reason why it cannot run here."""
        missing: str | None = self._answer()["missing"]
        return missing

    def run(self, result: Path | None = None) -> dict[str, float]:
        """Run for at least `MINIMUM_SECONDS`. Returns mean ``seconds`` per run, and ``peak_bytes`` of the process so far.

        result: a path for the pickled result of a single run.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{result or ''}\n")
        self._process.stdin.flush()
        measurement: dict[str, float] = self._answer()
        return measurement

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


def serve(open_variant: Callable[[ExitStack], tuple[Run | None, str]], answer: Callable[[Any], None]) -> None:
    """The process's side: answer each line of standard input, which is a path for the pickled result, or empty."""
    with ExitStack() as resources:
        run, reason = open_variant(resources)
        if run is None:
            answer({"missing": reason})
            return
        answer({"missing": None})
        for line in sys.stdin:
            path = line.strip()
            time.sleep(REST_SECONDS)
            total, count = 0.0, 0
            while not count or (total < MINIMUM_SECONDS and not path):
                start = time.perf_counter()
                result = run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # the time includes the work that is queued on a GPU
                total, count = total + time.perf_counter() - start, count + 1
                if path:
                    Path(path).write_bytes(pickle.dumps(result))
                del result  # its memory is free for the next run
            answer({"seconds": total / count, "peak_bytes": peak_bytes()})


def paired(seconds: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in paired rounds. Every second round goes in the opposite order.

    With more than one round, each variant is warmed up first.
    """
    if rounds > 1:
        for run in seconds.values():
            for _ in range(WARM_UP_RUNS):
                run()
    samples: dict[str, list[float]] = {name: [] for name in seconds}
    for number in range(rounds):
        for name, run in list(seconds.items())[:: 1 if number % 2 == 0 else -1]:
            samples[name].append(run())
    return samples
