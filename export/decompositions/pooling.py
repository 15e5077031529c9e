"""Pooling without indices and without scattering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdx.export.decompositions.plane import Pair, along_both, pair

aten = torch.ops.aten


class _MaxPool(torch.autograd.Function):
    """Max-pooling whose derivative finds the largest entries again by comparison, in place of PyTorch's saved indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Tensor:
        out: Tensor = aten.max_pool2d.default(x, kernel, stride, padding, dilation, ceil_mode)
        ctx.save_for_backward(x, out)
        ctx.geometry = kernel, stride, padding, dilation, ceil_mode
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, out = ctx.saved_tensors
        kernel, stride, padding, dilation, _ = ctx.geometry
        windows, (below, right) = _windows(x.shape[2:], *ctx.geometry)
        (top, left) = padding
        padded = torch.nn.functional.pad(x, (left, max(0, left + right), top, max(0, top + below)), value=-math.inf)
        unassigned = torch.ones_like(out, dtype=torch.bool)
        parts: list[list[Tensor]] = []
        for line in _slices(padded, windows, _offsets(x.shape[2:], kernel, padding, dilation), stride, dilation):
            parts.append([])
            for entry in line:
                first = (entry == out) & unassigned
                unassigned = unassigned & ~first
                parts[-1].append(torch.where(first, gradients[0], 0.0))
        return _spread(parts, x.shape[2:], stride, padding, dilation), None, None, None, None, None


def max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    kernel = pair(kernel)
    out: Tensor = _MaxPool.apply(x, kernel, pair(stride, kernel), pair(padding), pair(dilation), ceil_mode)  # type: ignore[no-untyped-call]
    return out


class _AvgPool(torch.autograd.Function):
    """Average pooling whose derivative is a sum of shifted copies."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, include_padding: bool, divisor: int | None
    ) -> Tensor:
        ctx.geometry = x.shape, kernel, stride, padding, ceil_mode, include_padding, divisor
        out: Tensor = aten.avg_pool2d.default(x, kernel, stride, padding, ceil_mode, include_padding, divisor)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shape, kernel, stride, padding, ceil_mode, include_padding, divisor = ctx.geometry
        gradient = gradients[0]
        windows, _ = _windows(shape[2:], kernel, stride, padding, (1, 1), ceil_mode)
        if divisor is None:
            counts = []
            for n, count, k, s, p in zip(shape[2:], windows, kernel, stride, padding, strict=True):
                start = torch.arange(count, device=gradient.device) * s - p
                stop = (start + k).clamp_max(n + p)  # with ceil_mode a window may reach beyond the padding; those entries never count
                counts.append(stop - start if include_padding else stop.clamp_max(n) - start.clamp_min(0))
            gradient = gradient / (counts[0][:, None] * counts[1][None, :]).to(gradient.dtype)
        else:
            gradient = gradient / divisor
        rows, columns = _offsets(shape[2:], kernel, padding, (1, 1))
        parts = [[gradient] * columns] * rows
        return _spread(parts, shape[2:], stride, padding, (1, 1)), None, None, None, None, None, None


def avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    kernel = pair(kernel)
    out: Tensor = _AvgPool.apply(x, kernel, pair(stride, kernel), pair(padding), ceil_mode, count_include_pad, divisor_override)  # type: ignore[no-untyped-call]
    return out


def avg_pool_1d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True
) -> Tensor:
    (k,), (s,), (p,) = ([value] if isinstance(value, int) else value for value in (kernel, stride or kernel, padding))
    return avg_pool(x.unsqueeze(-2), (1, k), (1, s), (0, p), ceil_mode, count_include_pad).squeeze(-2)


def max_pool_1d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    (k,), (s,), (p,), (d,) = ([value] if isinstance(value, int) else value for value in (kernel, stride or kernel, padding, dilation))
    return max_pool(x.unsqueeze(-2), (1, k), (1, s), (0, p), (1, d), ceil_mode).squeeze(-2)


def adaptive_avg_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    h, w = x.shape[-2:]
    if list(size) == [1, 1]:
        return x.mean((-2, -1), keepdim=True)
    if h % size[0] == 0 and w % size[1] == 0:
        windows: Tensor = x.unflatten(-1, (size[1], w // size[1])).unflatten(-3, (size[0], h // size[0]))
        return windows.mean((-3, -1))
    return along_both(x, *(_averages(n, m, x) for n, m in zip((h, w), size, strict=True)))


def adaptive_avg_pool_1d(x: Tensor, size: Sequence[int]) -> Tensor:
    return adaptive_avg_pool(x.unsqueeze(-2), (1, size[0])).squeeze(-2)


def adaptive_max_pool(x: Tensor, size: Sequence[int]) -> Any:
    """Each window's first largest entry, if the sizes divide. If not, PyTorch's own operator, which has no ONNX form."""
    (h, w), (oh, ow) = x.shape[-2:], size
    if h % oh or w % ow:
        return aten.adaptive_max_pool2d.default(x, size)
    windows = x.unflatten(-1, (ow, w // ow)).unflatten(-3, (oh, h // oh)).transpose(-3, -2).flatten(-2)
    first = torch.arange(windows.shape[-1], device=x.device) == windows.argmax(-1, keepdim=True)
    return (torch.where(first, windows, 0.0).sum(-1),)


def _averages(n: int, m: int, like: Tensor) -> Tensor:
    """A matrix [m, n] whose row i averages the entries from floor(i n/m) to ceil((i + 1) n/m)."""
    cell, entry = torch.arange(m, device=like.device)[:, None], torch.arange(n, device=like.device)[None]
    inside = (entry >= cell * n // m) & (entry * m < (cell + 1) * n)
    weights = inside.to(torch.promote_types(like.dtype, torch.float32))
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def _windows(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> tuple[Pair, Pair]:
    """Per dimension: the number of windows, and how many entries the last one reaches beyond the padding (negative: stops short)."""
    counts, beyond = [], []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        count = (room + s - 1 if ceil_mode else room) // s + 1
        if ceil_mode and (count - 1) * s >= n + p:  # the last window must start inside the image or its left padding
            count -= 1
        counts.append(count)
        beyond.append((count - 1) * s + d * (k - 1) + 1 - n - 2 * p)
    return (counts[0], counts[1]), (beyond[0], beyond[1])


def _offsets(size: Pair, kernel: Pair, padding: Pair, dilation: Pair) -> Pair:
    """The number of kernel offsets per dimension that reach the image. A window may be much larger than the image with ceil_mode."""
    rows, columns = (min(k, (n + p - 1) // d + 1) for n, k, p, d in zip(size, kernel, padding, dilation, strict=True))
    return rows, columns


def _spread(parts: Sequence[Sequence[Tensor]], size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The adjoint of `_slices`: the sum of parts[i][j] [n, C, h, w], one per kernel offset (i, j), in a tensor [n, C, *size].

    Kernel offsets with the same remainder modulo the stride share one grid of about h x w; the grids are interleaved at the end, so
    no step scatters.
    """
    height, width = parts[0][0].shape[2:]
    sh, sw = (s if count > 1 else 1 for s, count in zip(stride, (height, width), strict=True))  # a single window has no stride
    dh, dw = dilation
    rows = height + (len(parts) - 1) * dh // sh
    columns = width + (len(parts[0]) - 1) * dw // sw
    grids: dict[Pair, Tensor] = {}
    for i, line in enumerate(parts):
        for j, part in enumerate(line):
            (row, top), (column, left) = ((i * dh) % sh, (i * dh) // sh), ((j * dw) % sw, (j * dw) // sw)
            shifted = torch.nn.functional.pad(part, (left, columns - width - left, top, rows - height - top))
            grids[row, column] = grids[row, column] + shifted if (row, column) in grids else shifted
    empty = torch.zeros_like(next(iter(grids.values()))) if len(grids) < sh * sw else None
    if sh == sw == 1:
        total = grids[0, 0]
    else:
        lines = [torch.stack([grids.get((r, c), empty) for c in range(sw)], -1) for r in range(sh)]  # type: ignore[misc]
        total = torch.stack(lines, 3).reshape(part.shape[0], part.shape[1], rows * sh, columns * sw)
    (top, left), (h, w) = padding, size
    total = torch.nn.functional.pad(total, (0, max(0, left + w - columns * sw), 0, max(0, top + h - rows * sh)))
    return total[:, :, top : top + h, left : left + w]


def _slices(x: Tensor, windows: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> list[list[Tensor]]:
    """The entries of all windows at each kernel offset: [kernel rows][kernel columns] of [n, C, h, w]."""
    (h, w), (kh, kw), (sh, sw), (dh, dw) = windows, kernel, stride, dilation
    return [
        [x[:, :, i * dh : i * dh + (h - 1) * sh + 1 : sh, j * dw : j * dw + (w - 1) * sw + 1 : sw] for j in range(kw)] for i in range(kh)
    ]
