"""Normalisations as means, products and square roots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdx.kernels.geometry import wide


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor]:
    """Batch normalisation by running statistics, as one scale and one shift per channel: runtimes fold these into a convolution."""
    scale = (wide(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * wide(weight)
    shift = -wide(mean) * scale
    if bias is not None:
        shift = shift + wide(bias)
    shape = (-1, *[1] * (x.ndim - 2))
    return (x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape),)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, _cudnn: bool = True
) -> Tensor:
    out = _standardised(wide(x), tuple(range(-len(shape), 0)), eps).to(x.dtype)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    values = wide(x)
    dims = tuple(range(-len(shape), 0))
    out = (values * ((values * values).mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()).to(x.dtype)
    return out if weight is None else out * weight


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, _cudnn: bool = True
) -> Tensor:
    grouped = wide(x).reshape(x.shape[0], groups, -1)
    out = _standardised(grouped, (-1,), eps).reshape(x.shape).to(x.dtype)
    shape = (-1, *[1] * (x.ndim - 2))
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """x with mean 0 and variance 1 over ``dims``."""
    x = x - x.mean(dims, keepdim=True)
    return x * ((x * x).mean(dims, keepdim=True) + eps).rsqrt()
