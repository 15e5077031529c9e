"""Means of feature maps over windows that divide them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional


def adaptive_mean(features: Tensor, height: int, width: int) -> Tensor:
    """PyTorch's ``adaptive_avg_pool2d`` of features [n, C, H, W]: means [n, C, height, width] over windows, which overlap if their number
    does not divide H or W.

    On a GPU it is computed as two matrix products, because the backward pass of PyTorch's function is not deterministic there.
    """
    if features.device.type == "cuda":
        return products_with_windows(features, height, width)
    return functional.adaptive_avg_pool2d(features, (height, width))


def products_with_windows(features: Tensor, height: int, width: int) -> Tensor:
    """`adaptive_mean` as two matrix products, on every device; half-precision features are averaged in float32."""
    with torch.autocast(features.device.type, enabled=False):
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        sides = zip(features.shape[2:], (height, width), strict=True)
        rows, columns = (_windows(side, parts, wide.dtype, wide.device) for side, parts in sides)
        return (rows @ wide @ columns.T).to(features.dtype)


@cache
def _windows(side: int, parts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A row per window with its weights: window k contains the positions from floor(k side / parts) to ceil((k + 1) side / parts) - 1."""
    weights = torch.zeros(parts, side, dtype=torch.float64)
    for part in range(parts):
        start, end = part * side // parts, -(-(part + 1) * side // parts)
        weights[part, start:end] = 1 / (end - start)
    return weights.to(device, dtype)
