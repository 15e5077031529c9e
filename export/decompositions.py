"""Operators by other operators: what autograd can differentiate into a graph that every runtime runs.

Each form computes what PyTorch's operator computes, from operators whose derivatives ONNX and TensorRT have. Statistics are
taken in float32 at least. A max-pool's gradient goes to the first largest entry of a window, as PyTorch's does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten


def _accurate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_accurate(x))


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor]:
    """With the running statistics: one scale and one shift a channel, which runtimes fold into a convolution."""
    scale = (_wide(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * _wide(weight)
    shift = -_wide(mean) * scale
    if bias is not None:
        shift = shift + _wide(bias)
    shape = (-1, *[1] * (x.ndim - 2))
    return (x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape),)


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    return x * ((x * x).mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, _cudnn: bool = True
) -> Tensor:
    out = _normalized(_wide(x), tuple(range(-len(shape), 0)), eps).to(x.dtype)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    wide = _wide(x)
    dims = tuple(range(-len(shape), 0))
    out = (wide * ((wide * wide).mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()).to(x.dtype)
    return out if weight is None else out * weight


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, _cudnn: bool = True
) -> Tensor:
    grouped = _wide(x).reshape(x.shape[0], groups, -1)
    out = _normalized(grouped, (-1,), eps).reshape(x.shape).to(x.dtype)
    shape = (-1, *[1] * (x.ndim - 2))
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:  # several query heads share a key's
        key, value = (given.repeat_interleave(query.shape[-3] // given.shape[-3], -3) for given in (key, value))
    mask = attn_mask
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scores = _wide(query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ _wide(key).transpose(-2, -1)
    if mask is None or mask.is_floating_point():
        weights = (scores if mask is None else scores + mask).softmax(-1)
    else:  # a query that sees nothing gets zeros
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)
    return weights.to(value.dtype) @ value


Pair = tuple[int, int]


def _pair(value: int | Sequence[int], default: Pair = (1, 1)) -> Pair:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1]) if values else default


def _avg_pool_1d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True
) -> Tensor:
    (k,), (s,), (p,) = ([given] if isinstance(given, int) else given for given in (kernel, stride or kernel, padding))
    return _avg_pool(x.unsqueeze(-2), (1, k), (1, s), (0, p), ceil_mode, count_include_pad).squeeze(-2)


def _max_pool_1d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    (k,), (s,), (p,), (d,) = ([given] if isinstance(given, int) else given for given in (kernel, stride or kernel, padding, dilation))
    return _max_pool(x.unsqueeze(-2), (1, k), (1, s), (0, p), (1, d), ceil_mode).squeeze(-2)


def _windows(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> tuple[Pair, Pair]:
    """How many windows there are each way, and how many places beyond the right padding they reach (or, negative, stop short)."""
    counts, beyond = [], []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        count = (room + s - 1 if ceil_mode else room) // s + 1
        if ceil_mode and (count - 1) * s >= n + p:  # the last window must start inside the image or its left padding
            count -= 1
        counts.append(count)
        beyond.append((count - 1) * s + d * (k - 1) + 1 - n - 2 * p)
    return (counts[0], counts[1]), (beyond[0], beyond[1])


def _spread(parts: Sequence[Sequence[Tensor]], size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The adjoint of taking shifted slices: parts[i][j] [n, C, h, w], of the kernel's place i, j, added up on [n, C, *size].

    Kernel places that land on the same residue of the stride share a grid of h x w; the grids are interleaved at the end, so no
    step scatters.
    """
    height, width = parts[0][0].shape[2:]
    (sh, sw), (dh, dw) = stride, dilation
    rows = height + (len(parts) - 1) * dh // sh
    columns = width + (len(parts[0]) - 1) * dw // sw
    grids: dict[Pair, Tensor] = {}
    for i, line in enumerate(parts):
        for j, part in enumerate(line):
            (down, top), (across, left) = ((i * dh) % sh, (i * dh) // sh), ((j * dw) % sw, (j * dw) // sw)
            placed = torch.nn.functional.pad(part, (left, columns - width - left, top, rows - height - top))
            grids[down, across] = grids[down, across] + placed if (down, across) in grids else placed
    empty = torch.zeros_like(next(iter(grids.values()))) if len(grids) < sh * sw else None
    if sh == sw == 1:
        whole = grids[0, 0]
    else:
        lines = [torch.stack([grids.get((r, c), empty) for c in range(sw)], -1) for r in range(sh)]  # type: ignore[misc]
        whole = torch.stack(lines, 3).reshape(part.shape[0], part.shape[1], rows * sh, columns * sw)
    (top, left), (h, w) = padding, size
    whole = torch.nn.functional.pad(whole, (0, max(0, left + w - columns * sw), 0, max(0, top + h - rows * sh)))
    return whole[:, :, top : top + h, left : left + w]


def _slices(x: Tensor, windows: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> list[list[Tensor]]:
    """For each place of the kernel, the entry of every window there: [kernel rows][kernel columns] of [n, C, h, w]."""
    (h, w), (kh, kw), (sh, sw), (dh, dw) = windows, kernel, stride, dilation
    return [
        [x[:, :, i * dh : i * dh + (h - 1) * sh + 1 : sh, j * dw : j * dw + (w - 1) * sw + 1 : sw] for j in range(kw)] for i in range(kh)
    ]


class _MaxPool(torch.autograd.Function):
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
        windows, (down, across) = _windows(x.shape[2:], *ctx.geometry)
        (top, left) = padding
        padded = torch.nn.functional.pad(x, (left, max(0, left + across), top, max(0, top + down)), value=-math.inf)
        free = torch.ones_like(out, dtype=torch.bool)
        parts: list[list[Tensor]] = []
        for line in _slices(padded, windows, kernel, stride, dilation):
            parts.append([])
            for entry in line:
                first = (entry == out) & free
                free = free & ~first
                parts[-1].append(torch.where(first, gradients[0], 0.0))
        return _spread(parts, x.shape[2:], stride, padding, dilation), None, None, None, None, None


def _max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    kernel = _pair(kernel)
    found: Tensor = _MaxPool.apply(x, kernel, _pair(stride, kernel), _pair(padding), _pair(dilation), ceil_mode)  # type: ignore[no-untyped-call]
    return found


class _AvgPool(torch.autograd.Function):
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
                stop = (start + k).clamp_max(n + p)  # a window of ceil_mode may reach beyond the padding, which counts nowhere
                counts.append(stop - start if include_padding else stop.clamp_max(n) - start.clamp_min(0))
            gradient = gradient / (counts[0][:, None] * counts[1][None, :]).to(gradient.dtype)
        else:
            gradient = gradient / divisor
        parts = [[gradient] * kernel[1]] * kernel[0]
        return _spread(parts, shape[2:], stride, padding, (1, 1)), None, None, None, None, None, None


def _avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    kernel = _pair(kernel)
    found: Tensor = _AvgPool.apply(x, kernel, _pair(stride, kernel), _pair(padding), ceil_mode, count_include_pad, divisor_override)  # type: ignore[no-untyped-call]
    return found


def _adaptive_avg_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    h, w = x.shape[-2:]
    if list(size) == [1, 1]:
        return x.mean((-2, -1), keepdim=True)
    if h % size[0] == 0 and w % size[1] == 0:
        windows: Tensor = x.unflatten(-1, (size[1], w // size[1])).unflatten(-3, (size[0], h // size[0]))
        return windows.mean((-3, -1))
    return _along(x, *(_averages(n, m, x) for n, m in zip((h, w), size, strict=True)))


def _adaptive_avg_pool_1d(x: Tensor, size: Sequence[int]) -> Tensor:
    return _adaptive_avg_pool(x.unsqueeze(-2), (1, size[0])).squeeze(-2)


def _adaptive_max_pool(x: Tensor, size: Sequence[int]) -> Any:
    """Where the sizes divide: the entry at each window's first largest place. Elsewhere PyTorch's own, which has no ONNX form."""
    (h, w), (oh, ow) = x.shape[-2:], size
    if h % oh or w % ow:
        return aten.adaptive_max_pool2d.default(x, size)
    windows = x.unflatten(-1, (ow, w // ow)).unflatten(-3, (oh, h // oh)).transpose(-3, -2).flatten(-2)
    first = torch.arange(windows.shape[-1], device=x.device) == windows.argmax(-1, keepdim=True)
    return (torch.where(first, windows, 0.0).sum(-1),)


def _averages(n: int, m: int, like: Tensor) -> Tensor:
    """[m, n]: row i averages the entries from floor(i n/m) to ceil((i + 1) n/m)."""
    cell, place = torch.arange(m, device=like.device)[:, None], torch.arange(n, device=like.device)[None]
    inside = (place >= cell * n // m) & (place * m < (cell + 1) * n)
    weights = inside.to(_accurate(like))
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def _along(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return down @ x @ across.T


def _size(x: Tensor, size: Sequence[int] | None, factors: Sequence[float] | None) -> Pair:
    if size is not None:
        return _pair(size)
    assert factors is not None
    return int(x.shape[2] * factors[0]), int(x.shape[3] * factors[1])


def _step(n: int, m: int, factor: float | None) -> float:
    """How far apart two outputs are in the input: PyTorch takes the factor that it was given, but for sizes that stay."""
    return 1 / factor if factor and m != n else n / m


def _nearest(x: Tensor, size: Sequence[int] | None, factors: Sequence[float] | None = None) -> Tensor:
    (h, w), (oh, ow), given = x.shape[2:], _size(x, size, factors), factors or (None, None)
    if all(m % n == 0 and (m // n <= 2 or factor in (None, m // n)) for n, m, factor in zip((h, w), (oh, ow), given, strict=True)):
        grown = x[:, :, :, None, :, None].expand(-1, -1, -1, oh // h, -1, ow // w)
        return grown.reshape(x.shape[0], x.shape[1], oh, ow)
    matrices = []
    for n, m, factor in zip((h, w), (oh, ow), given, strict=True):
        source = (torch.arange(m, device=x.device) * (_step(n, m, factor if m != 2 * n else None))).floor().clamp_max(n - 1)
        matrices.append((source[:, None] == torch.arange(n, device=x.device)[None]).to(x.dtype))
    return _along(x, *matrices)


def _bilinear(x: Tensor, size: Sequence[int] | None, align_corners: bool, factors: Sequence[float] | None = None) -> Tensor:
    matrices = []
    for n, m, factor in zip(x.shape[2:], _size(x, size, factors), factors or (None, None), strict=True):
        place = torch.arange(m, device=x.device, dtype=_accurate(x))
        if align_corners:
            source = place * ((n - 1) / (m - 1) if m > 1 else 0.0)
        else:
            source = ((place + 0.5) * _step(n, m, factor) - 0.5).clamp(0, n - 1)
        matrices.append((1 - (source[:, None] - torch.arange(n, device=x.device)[None]).abs()).clamp_min(0).to(x.dtype))
    return _along(x, *matrices)


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: object,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """The input's gradient alone: weights are constants here, and where they depend on the image there is no form."""
    if any(output_mask[1:]):
        return NotImplemented
    zero = [0] * len(stride)
    if transposed:
        found = aten.convolution.default(gradient, weight, None, stride, padding, dilation, False, zero, groups)
        for dim, (beyond, s) in enumerate(zip(output_padding, stride, strict=True), start=2):
            if beyond >= s:  # allowed below the dilation; such places come from no input
                found = found.narrow(dim, 0, x.shape[dim])
        return found, None, None
    kernel = weight.shape[2:]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(s == 1 for s in stride) and all(r >= p for r, p in zip(reach, padding, strict=True)):
        # A convolution with the kernel turned around: runtimes have faster kernels for it than for the transposed one.
        turned = weight.flip(list(range(2, weight.ndim))) if max(kernel) > 1 else weight
        turned = turned.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)
        padding = [r - p for r, p in zip(reach, padding, strict=True)]
        return aten.convolution.default(gradient, turned, None, stride, padding, dilation, False, zero, groups), None, None
    places = zip(x.shape[2:], gradient.shape[2:], stride, padding, reach, strict=True)
    missing = [n - ((m - 1) * s - 2 * p + r + 1) for n, m, s, p, r in places]
    return aten.convolution.default(gradient, weight, None, stride, padding, dilation, True, missing, groups), None, None


def _slice_backward(gradient: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """Zeros around, and for a step between, the slice's gradient: padding where PyTorch would scatter."""
    dim %= len(sizes)
    n, count = sizes[dim], gradient.shape[dim]
    start = max(0, start + n if start < 0 else min(start, n))
    if step > 1:
        gradient = gradient.unsqueeze(dim + 1)
        gradient = _padded(gradient, dim + 1, 0, step - 1).flatten(dim, dim + 1).narrow(dim, 0, (count - 1) * step + 1)
    return _padded(gradient, dim, start, n - start - gradient.shape[dim])


def _select_backward(gradient: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim %= len(sizes)
    index %= sizes[dim]
    return _padded(gradient.unsqueeze(dim), dim, index, sizes[dim] - index - 1)


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    if isinstance(before, int) and isinstance(after, int) and before == after == 0:
        return x
    return torch.nn.functional.pad(x, [*[0, 0] * (x.ndim - dim - 1), before, after])


def _pad(x: Tensor, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """x between edges of padding[2 i] and padding[2 i + 1] places along its i-th dimension from the last."""
    if mode == "constant" or min(padding) < 0:
        plain: Tensor = aten.pad.default(x, padding, mode, value)
        return plain
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


def _copy(x: Tensor, source: Tensor, _non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape)


def _unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    count = (x.shape[dim] - size) // step + 1
    starts = (x.narrow(dim, i, (count - 1) * step + 1) for i in range(size))
    return torch.stack([aten.slice.Tensor(start, dim, 0, start.shape[dim], step) for start in starts], -1)


FORMS: dict[Any, Callable[..., Any]] = {
    aten.view.default: torch.reshape,  # the strides that a form leaves may be others than its operator's
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.max_pool1d.default: _max_pool_1d,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool1d.default: _avg_pool_1d,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool_1d,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.upsample_nearest2d.vec: _nearest,
    aten.upsample_bilinear2d.vec: _bilinear,
    aten.pad.default: _pad,
    aten.copy.default: _copy,
    aten.unfold.default: _unfold,
}
"""An operator of a forward program -> the same function of other operators."""

BACKWARD: dict[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            aten._softmax_backward_data,
            aten._log_softmax_backward_data,
            aten.elu_backward,
            aten.gelu_backward,
            aten.glu_backward,
            aten.hardsigmoid_backward,
            aten.hardswish_backward,
            aten.hardtanh_backward,
            aten.leaky_relu_backward,
            aten.mish_backward,
            aten.sigmoid_backward,
            aten.silu_backward,
            aten.softplus_backward,
            aten.tanh_backward,
            aten.threshold_backward,
        ]
    ),
    aten.convolution_backward.default: _convolution_backward,
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
}
"""A derivative that autograd writes -> the same function of other operators."""
