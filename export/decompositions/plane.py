"""What pooling and resizing share: sizes along height and width, and a matrix applied along each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Pair = tuple[int, int]
"""One number for the height and one for the width."""


def pair(value: int | Sequence[int], default: Pair = (1, 1)) -> Pair:
    """An operator's argument as a pair: PyTorch also takes one number for both, and an empty sequence for the default."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1]) if values else default


def along_both(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply ``rows`` [out, H] along the height and ``columns`` [out, W] along the width of x [n, C, H, W]."""
    return rows @ x @ columns.T
