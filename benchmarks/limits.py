"""What the machine can do at most, measured: products of matrices, and bytes moved; every case's floor is counted in these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.subject import Work

SIDES, VALUES, REPEATS = (1024, 2048, 3072), 1 << 26, 9
"""Of the square matrices, and of the vectors that are copied: far more than any cache holds."""


def limits() -> dict[str, float]:
    """Operations a second of a float32 product (``operations``; ``operations, one thread``; ``operations, bf16``) and bytes a second of a
    copy, those read and those written (``bytes``), each the best of several sizes and times."""
    to, of = torch.empty(VALUES), torch.ones(VALUES)
    threads = torch.get_num_threads()
    found = {
        "operations": max(_rate(side, torch.float32) for side in SIDES),
        "operations, bf16": max(_rate(side, torch.bfloat16) for side in SIDES),
        "bytes": 2 * of.nbytes / _best(lambda: to.copy_(of)),
    }
    torch.set_num_threads(1)
    try:
        found["operations, one thread"] = max(_rate(side, torch.float32) for side in SIDES[:2])
    finally:
        torch.set_num_threads(threads)
    return found


def floor(work: Work, of: Mapping[str, float], *, bfloat16: bool = False) -> float:
    """Seconds that the work takes where nothing but the machine's limits holds it up."""
    return max(work.operations / of["operations, bf16" if bfloat16 else "operations"], work.bytes / of["bytes"])


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
