"""What the machine can do at most, measured: products of matrices, and bytes moved; every case's floor is counted in these."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.subject import Work

SIDE, VALUES, REPEATS = 3072, 1 << 26, 7
"""Of the square matrices, and of the vectors that are copied: far more than any cache holds."""


def limits() -> dict[str, float]:
    """Operations a second of a float32 product (``operations``; ``operations, one thread``; ``operations, bf16``) and bytes a second of a
    copy, those read and those written (``bytes``), each the best of several."""
    matrix = torch.randn(SIDE, SIDE)
    half = matrix.bfloat16()
    to, of = torch.empty(VALUES), torch.ones(VALUES)
    threads = torch.get_num_threads()
    found = {
        "operations": 2 * SIDE**3 / _best(lambda: matrix @ matrix),
        "operations, bf16": 2 * SIDE**3 / _best(lambda: half @ half),
        "bytes": 2 * of.nbytes / _best(lambda: to.copy_(of)),
    }
    torch.set_num_threads(1)
    try:
        found["operations, one thread"] = 2 * SIDE**3 / _best(lambda: matrix @ matrix)
    finally:
        torch.set_num_threads(threads)
    return found


def floor(work: Work, of: dict[str, float]) -> float:
    """Seconds that the work takes where nothing but the machine's limits holds it up."""
    return max(work.operations / of["operations"], work.bytes / of["bytes"])


def _best(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
