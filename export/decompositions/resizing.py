"""Resizing as repetition, or as one matrix along the height and one along the width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdx.export.decompositions.plane import Pair, along_both, pair


def nearest(x: Tensor, size: Sequence[int] | None, factors: Sequence[float] | None = None) -> Tensor:
    (h, w), (oh, ow), scales = x.shape[2:], _output_size(x, size, factors), factors or (None, None)
    if all(m % n == 0 and (m // n <= 2 or factor in (None, m // n)) for n, m, factor in zip((h, w), (oh, ow), scales, strict=True)):
        repeated = x[:, :, :, None, :, None].expand(-1, -1, -1, oh // h, -1, ow // w)
        return repeated.reshape(x.shape[0], x.shape[1], oh, ow)
    matrices = []
    for n, m, factor in zip((h, w), (oh, ow), scales, strict=True):
        source = (torch.arange(m, device=x.device) * (_step(n, m, factor if m != 2 * n else None))).floor().clamp_max(n - 1)
        matrices.append((source[:, None] == torch.arange(n, device=x.device)[None]).to(x.dtype))
    return along_both(x, *matrices)


def bilinear(x: Tensor, size: Sequence[int] | None, align_corners: bool, factors: Sequence[float] | None = None) -> Tensor:
    matrices = []
    for n, m, factor in zip(x.shape[2:], _output_size(x, size, factors), factors or (None, None), strict=True):
        index = torch.arange(m, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        if align_corners:
            source = index * ((n - 1) / (m - 1) if m > 1 else 0.0)
        else:
            source = ((index + 0.5) * _step(n, m, factor) - 0.5).clamp(0, n - 1)
        matrices.append((1 - (source[:, None] - torch.arange(n, device=x.device)[None]).abs()).clamp_min(0).to(x.dtype))
    return along_both(x, *matrices)


def _output_size(x: Tensor, size: Sequence[int] | None, factors: Sequence[float] | None) -> Pair:
    if size is not None:
        return pair(size)
    assert factors is not None
    return int(x.shape[2] * factors[0]), int(x.shape[3] * factors[1])


def _step(n: int, m: int, factor: float | None) -> float:
    """The distance in the input between two outputs. PyTorch derives it from ``factor`` if there is one and the size changes."""
    return 1 / factor if factor and m != n else n / m
