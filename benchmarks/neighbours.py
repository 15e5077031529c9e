"""kdx beside busy processes and on an idle machine, with threads that spin, threads that do not, and as kdx sets them itself.

Each variant computes in a process of its own, whose environment says how OpenMP's threads wait. Beside busy processes, a process for each
core counts in a loop. They are stopped between the runs, so that they disturb only the runs of their own variant.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from benchmarks.comparison import Comparison, Run, Variant, require_agreement
from kdx import threads

TOLERANCE = 1e-6
"""Largest difference of a score from that of the first variant."""

SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""The count that libgomp uses without a setting. As a setting of the user, kdx does not change it."""

VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "passive": ("import torch, kdx", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "spinning": ("import torch, kdx", SPINNING),
    "kdx, imported after PyTorch": ("import torch, kdx", {}),
    "kdx, imported before PyTorch": ("import kdx, torch", {}),
}
"""The imports and the environment of each variant's process."""

_UNICAM = """
from benchmarks.geometry import networks
student, base, labels = networks({n}, {channels}, {side}, {side})
run = lambda: kdx.unicam(student, base, labels).score
"""

_COMPARE = """
from benchmarks.scores import draw
student, base, labels = draw({n}, {d})
run = lambda: kdx.compare({{"layer": {{"student": student, "base": base}}}}, labels)["layer"].scores["RS(S|B)"].value
"""

_SERVE = """
import json, sys
for line in sys.stdin:
    print(json.dumps(float(run())), flush=True)
"""


def unicam(_: Path, *, n: int, channels: int, side: int, busy: bool) -> Comparison:
    """One call of `kdx.unicam`, a few milliseconds. busy: whether there are busy processes."""
    return _comparison(_UNICAM.format(n=n, channels=channels, side=side), busy)


def compare(_: Path, *, n: int, d: int, busy: bool) -> Comparison:
    """One call of `kdx.compare` with 999 permutations. busy: whether there are busy processes."""
    return _comparison(_COMPARE.format(n=n, d=d), busy)


def _comparison(code: str, busy: bool) -> Comparison:
    def variant(imports: str, environment: dict[str, str]) -> Variant:
        def opened(resources: ExitStack) -> Run:
            process = resources.enter_context(_process(f"{imports}\n{code}\n{_SERVE}", environment))
            neighbours = resources.enter_context(Neighbours(busy))

            def run() -> float:
                with neighbours.running():
                    return _answer(process)

            _answer(process)  # what only a first run does
            return run

        return opened

    return Comparison({name: variant(*settings) for name, settings in VARIANTS.items()}, _check)


@contextmanager
def _process(code: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that answers each line of its standard input with the result of one run."""
    clean = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=clean | environment, cwd=folder) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _answer(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise subprocess.CalledProcessError(process.wait(), process.args)
    return float(json.loads(line))


class Neighbours:
    """One process per core, which counts in a loop unless it is stopped. A context manager, with which the processes end. busy: False for
    no processes."""

    def __init__(self, busy: bool = True) -> None:
        self._busy = busy

    def __enter__(self) -> Self:
        self._resources = ExitStack()
        count = threads.available_cores() if self._busy else 0
        self._processes = [self._resources.enter_context(_stopped_loop()) for _ in range(count)]
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the processes run during the block."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            for process in self._processes:
                process.send_signal(signal.SIGSTOP)


@contextmanager
def _stopped_loop() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped, and would otherwise need a core all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.kill()


def _check(results: Mapping[str, Any]) -> dict[str, float]:
    """The differences of each variant's score from that of the first one."""
    first = next(iter(results.values()))
    figures = {f"score of {name}": abs(score - first) for name, score in results.items()}
    require_agreement(figures, TOLERANCE)
    return figures
