"""The derivative of convolutions as another convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _per_dimension(values: Sequence[int], dims: int) -> list[int]:
    """One value per spatial dimension. PyTorch also takes one value for all of them, as the padding "valid" has."""
    return [*values] * dims if len(values) == 1 else [*values]


def convolution_backward(
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
    """The input's gradient only, with the operator's own parameters.

    Weights are constants here. NotImplemented if their gradient is wanted, as it is where weights depend on the images.
    """
    if any(output_mask[1:]):
        return NotImplemented
    dims = weight.ndim - 2
    stride, padding, dilation, output_padding = (_per_dimension(values, dims) for values in (stride, padding, dilation, output_padding))
    zero = [0] * dims
    if transposed:
        out = aten.convolution.default(gradient, weight, None, stride, padding, dilation, False, zero, groups)
        for dim, (extra, s) in enumerate(zip(output_padding, stride, strict=True), start=2):
            if extra >= s:  # allowed if below the dilation; these entries come from no input
                out = out.narrow(dim, 0, x.shape[dim])
        return out, None, None
    kernel = weight.shape[2:]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(s == 1 for s in stride) and all(r >= p for r, p in zip(reach, padding, strict=True)):
        # A convolution with the flipped kernel: runtimes have faster kernels for it than for a transposed convolution.
        flipped = weight.flip(list(range(2, weight.ndim))) if max(kernel) > 1 else weight
        flipped = flipped.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)
        padding = [r - p for r, p in zip(reach, padding, strict=True)]
        return aten.convolution.default(gradient, flipped, None, stride, padding, dilation, False, zero, groups), None, None
    sizes = zip(x.shape[2:], gradient.shape[2:], stride, padding, reach, strict=True)
    uncovered = [n - ((m - 1) * s - 2 * p + r + 1) for n, m, s, p, r in sizes]
    return aten.convolution.default(gradient, weight, None, stride, padding, dilation, True, uncovered, groups), None, None
