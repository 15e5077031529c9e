"""Padding, copies, windows, and the derivatives of slices: entries that move and keep their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def slice_backward(gradient: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """The slice's gradient with zeros around it and, for a step, between its entries. PyTorch scatters; this only pads."""
    dim %= len(sizes)
    n, count = sizes[dim], gradient.shape[dim]
    start = max(0, start + n if start < 0 else min(start, n))
    if step > 1:
        gradient = gradient.unsqueeze(dim + 1)
        gradient = _zero_padded(gradient, dim + 1, 0, step - 1).flatten(dim, dim + 1).narrow(dim, 0, (count - 1) * step + 1)
    return _zero_padded(gradient, dim, start, n - start - gradient.shape[dim])


def select_backward(gradient: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim %= len(sizes)
    index %= sizes[dim]
    return _zero_padded(gradient.unsqueeze(dim), dim, index, sizes[dim] - index - 1)


def _zero_padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    if isinstance(before, int) and isinstance(after, int) and before == after == 0:
        return x
    return torch.nn.functional.pad(x, [*[0, 0] * (x.ndim - dim - 1), before, after])


def pad(x: Tensor, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """x padded by padding[2 i] entries before and padding[2 i + 1] entries after its i-th dimension, counted from the last."""
    if mode == "constant" or min(padding) < 0:
        out: Tensor = aten.pad.default(x, padding, mode, value)
        return out
    for i in range(len(padding) // 2):
        dim, before, after = x.ndim - 1 - i, padding[2 * i], padding[2 * i + 1]
        n = x.shape[dim]
        if mode == "replicate":
            first = x.narrow(dim, 0, 1).expand(*x.shape[:dim], before, *x.shape[dim + 1 :])
            last = x.narrow(dim, n - 1, 1).expand(*x.shape[:dim], after, *x.shape[dim + 1 :])
        elif mode == "reflect":
            first, last = x.narrow(dim, 1, before).flip(dim), x.narrow(dim, n - 1 - after, after).flip(dim)
        else:
            first, last = x.narrow(dim, n - before, before), x.narrow(dim, 0, after)
        x = torch.cat([first] * (before > 0) + [x] + [last] * (after > 0), dim)
    return x


def copy(x: Tensor, source: Tensor, _non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape)


def unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    count = (x.shape[dim] - size) // step + 1
    starts = (x.narrow(dim, i, (count - 1) * step + 1) for i in range(size))
    return torch.stack([aten.slice.Tensor(start, dim, 0, start.shape[dim], step) for start in starts], -1)
