"""Launches of kernels whose blocks have 256 threads, and the sizes of their grids."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kdx.kernels import cuda
from kdx.kernels.drivers import Size

THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 8
"""More blocks than a multiprocessor runs at once, so that all multiprocessors finish at about the same time."""


def launch(on: Tensor, source: str, kernel: str, grid: Size, *arguments: Tensor | np.generic | float | None) -> None:
    """Launch a kernel on a tensor's device. Python integers become int32, other Python numbers float64."""
    packed = [
        np.int32(value) if isinstance(value, int) else np.float64(value) if isinstance(value, float) else value for value in arguments
    ]
    cuda.launcher(on.device).launch(source, kernel, grid, (THREADS, 1, 1), packed)


def full_grid(on: Tensor) -> int:
    """The number of blocks that fills the device."""
    return _BLOCKS_PER_MULTIPROCESSOR * cuda.launcher(on.device).multiprocessors


def warps(count: int) -> int:
    """The number of blocks that have ``count`` warps."""
    return -(-count // (THREADS // 32))


def check(holds: bool, demand: str) -> None:
    """Raise ValueError with ``demand`` unless it holds."""
    if not holds:
        raise ValueError(demand)
