"""Measure the limits of the machine: the rates of matrix products and of copies. Each case's lower bound is counted in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.comparison import Work

SIDES, VALUES, REPEATS = (1024, 2048, 3072), 1 << 26, 9
"""The sides of the square matrices, and the length of the copied vectors, which exceeds any cache."""


def limits() -> dict[str, float]:
    """Operations per second of matrix products, and bytes per second of a copy. Each is the best of several sizes and repetitions.

    ``operations``, ``operations, one thread``: float32. ``operations, bf16``: bfloat16. ``bytes``: read and written.
    """
    destination, source = torch.empty(VALUES), torch.ones(VALUES)
    threads = torch.get_num_threads()
    rates = {
        "operations": max(_rate(side, torch.float32) for side in SIDES),
        "operations, bf16": max(_rate(side, torch.bfloat16) for side in SIDES),
        "bytes": 2 * source.nbytes / _best(lambda: destination.copy_(source)),
    }
    torch.set_num_threads(1)
    try:
        rates["operations, one thread"] = max(_rate(side, torch.float32) for side in SIDES[:2])
    finally:
        torch.set_num_threads(threads)
    return rates


def lower_bound(work: Work, machine: Mapping[str, float], *, bfloat16: bool = False) -> float:
    """The seconds that the work takes at the machine's limits: those of its operations or of its bytes, whichever are more."""
    return max(work.operations / machine["operations, bf16" if bfloat16 else "operations"], work.bytes / machine["bytes"])


def _rate(side: int, dtype: torch.dtype) -> float:
    matrix = torch.randn(side, side).to(dtype)
    return 2 * side**3 / _best(lambda: matrix @ matrix)


def _best(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
