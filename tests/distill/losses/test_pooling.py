"""Means over windows by matrix products are those of PyTorch's adaptive pooling."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kdx.distill.losses.pooling import products_with_windows


@pytest.mark.parametrize(("side", "size"), [((8, 8), (2, 2)), ((7, 5), (3, 2)), ((9, 4), (4, 4)), ((6, 6), (1, 1)), ((5, 7), (5, 6))])
def test_products_with_windows_are_adaptive_pooling(side: tuple[int, int], size: tuple[int, int]) -> None:
    features = torch.rand(2, 3, *side, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected, actual = functional.adaptive_avg_pool2d(features, size), products_with_windows(features, *size)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand(expected.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * means).sum(), features)[0] for means in (expected, actual)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
