"""Compile, cache, load and launch the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError

Backend = Literal["auto", "torch", "cuda"]


class Launcher(Protocol):
    """What wrappers launch kernels with."""

    multiprocessors: int

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Tensor | np.generic | None],
        shared: int = 0,
    ) -> None: ...


def launcher(device: torch.device) -> Launcher:
    """Not yet."""
    raise KdxError(f"No kernel runs on {device}.", "Choose the backend torch.")


def runs(x: Tensor, backend: Backend = "auto") -> bool:
    """Not yet."""
    return False
