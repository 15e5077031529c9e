"""Measure the limits of the machine: the rates of matrix products and of copies. Each case's lower bound is counted in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.comparison import Work
from kdx.kernels import ambient

SIDES, VALUES, REPEATS = (1024, 2048, 3072), 1 << 26, 9
"""The sides of the square matrices, and the length of the copied vectors, which exceeds any cache."""

ENOUGH_SECONDS, LONG_SECONDS = 3.0, 1.0
"""After how many seconds nothing is repeated, and from which time of a product no larger one is tried: a processor without instructions for
bfloat16 multiplies such matrices 180 times slower than those of float32."""


def limits() -> dict[str, float]:
    """Operations per second of matrix products, and bytes per second of a copy. Each is the best of several sizes and repetitions.

    ``operations``, ``operations, one thread``: float32. ``operations, bf16``: bfloat16. ``bytes``: read and written.
    """
    destination, source = torch.empty(VALUES), torch.ones(VALUES)
    rates = {
        "operations": _rate(torch.float32),
        "operations, bf16": _rate(torch.bfloat16),
        "bytes": 2 * source.nbytes / _best(lambda: destination.copy_(source)),
    }
    with ambient.torch_threads(1):
        rates["operations, one thread"] = _rate(torch.float32)
    return rates


def lower_bound(work: Work, machine: Mapping[str, float], *, bfloat16: bool = False) -> float:
    """The seconds that the work takes at the machine's limits: those of its operations or of its bytes, whichever are more."""
    return max(work.operations / machine["operations, bf16" if bfloat16 else "operations"], work.bytes / machine["bytes"])


def _rate(dtype: torch.dtype) -> float:
    """The highest rate of the sides, without those larger than one that takes too long."""
    rates = []
    for side in SIDES:
        matrix = torch.randn(side, side).to(dtype)
        seconds = _best(partial(torch.mm, matrix, matrix))
        rates.append(2 * side**3 / seconds)
        if seconds > LONG_SECONDS:
            break
    return max(rates)


def _best(run: Callable[[], object]) -> float:
    """The shortest time of a run. The first run counts only if it takes so long that it is the only one."""
    seconds: list[float] = []
    while len(seconds) <= REPEATS and sum(seconds) < ENOUGH_SECONDS:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:] or seconds)
