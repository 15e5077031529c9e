"""Compare a decomposition and its derivative with PyTorch's operator and autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kdx.export import decompositions

aten = torch.ops.aten

ADDED = 1e-14
"""Values are the same; gradients are sums of the same numbers in another order."""

HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""A few roundings of the largest value: 11 and 8 bits of significand."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal random numbers that are not contiguous in memory, like a channels-last or sliced feature."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return wide[..., ::2].to(dtype)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Whole numbers from -2 to 2, so that there are windows with ties and windows without positive entries."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def passed(function: Callable[..., Any], args: Sequence[Any], **kwargs: Any) -> tuple[Tensor, ...]:
    """The result, and the vector-Jacobian product of each floating-point tensor among the arguments."""
    leaves = [arg.detach().requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    out = function(*leaves, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    cotangent = normal(*out.shape, 1, seed=7, dtype=out.dtype)[..., 0]
    return out, *torch.autograd.grad(out, [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad], cotangent)


def agree(operator: Any, *args: Any, tolerance: float = 1e-12, **kwargs: Any) -> None:
    for ours, theirs in zip(passed(decompositions.FORWARD[operator], args, **kwargs), passed(operator, args, **kwargs), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(scale, 1e-30))


def product(seed: int, count: int, **choices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """``count`` of all combinations, drawn at random without repetition."""
    every = list(itertools.product(*choices.values()))
    for i in torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].tolist():
        yield dict(zip(choices, every[i], strict=True))


SIZES = [(7, 9), (8, 5), (11, 12), (6, 6)]
KERNELS = [(1, 1), (2, 2), (3, 3), (2, 3), (5, 4), (1, 3)]
STRIDES = [(), (1, 1), (2, 2), (2, 1), (3, 4), (1, 5)]
