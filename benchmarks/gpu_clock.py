"""Times on a GPU by its events, and times on the CPU, which replaces a GPU at toy size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch


class Clock(Protocol):
    """Samples of the time of a call, after warming up."""

    device: torch.device

    def seconds(self, run: Callable[[], object]) -> list[float]:
        """Samples in seconds of the work that a call gives to the device."""
        ...

    def wall_seconds(self, run: Callable[[], object]) -> list[float]:
        """Samples in seconds from the call until the device has done its work, including the time of the processor."""
        ...

    def bandwidth(self) -> float:
        """Bytes per second of a copy, read and written."""
        ...


CYCLES_PER_SECOND = 2e9
"""An upper bound of the clock rate of a GPU's multiprocessors."""


class GpuClock:
    """Measures by events of the GPU. Before each sample, other data fill its cache.

    The GPU first waits until the processor has queued all launches. Otherwise the samples of many small launches would measure the
    processor.
    """

    def __init__(self, device: torch.device, samples: int) -> None:
        self.device = device
        self.samples = samples
        self._cache_filler = torch.empty(1 << 30, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], object]) -> list[float]:
        for _ in range(3):
            start_of_launches = time.perf_counter()
            run()
            launches = time.perf_counter() - start_of_launches
        torch.cuda.synchronize(self.device)
        samples = []
        for _ in range(self.samples):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._cache_filler.zero_()
            torch.cuda._sleep(int(1.5 * launches * CYCLES_PER_SECOND))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            samples.append(start.elapsed_time(end) / 1e3)
        return samples

    def wall_seconds(self, run: Callable[[], object]) -> list[float]:
        return _wall_seconds(run, self.samples, lambda: torch.cuda.synchronize(self.device))

    def bandwidth(self) -> float:
        destination = torch.empty_like(self._cache_filler)
        return 2 * destination.nbytes / median(self.seconds(lambda: destination.copy_(self._cache_filler)))


class CpuClock:
    """Measures on the CPU. A single sample is taken without warming up."""

    def __init__(self, samples: int) -> None:
        self.device = torch.device("cpu")
        self.samples = samples

    def seconds(self, run: Callable[[], object]) -> list[float]:
        return _wall_seconds(run, self.samples, lambda: None, warm_up=0)

    def wall_seconds(self, run: Callable[[], object]) -> list[float]:
        return self.seconds(run)

    def bandwidth(self) -> float:
        source, destination = (torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(2))
        return 2 * destination.nbytes / median(self.seconds(lambda: destination.copy_(source)))


def _wall_seconds(run: Callable[[], object], samples: int, synchronize: Callable[[], None], warm_up: int = 3) -> list[float]:
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(samples):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def median(samples: list[float]) -> float:
    return float(np.median(samples))
