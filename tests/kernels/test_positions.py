"""Distances and shares from the products of every position, against the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx.kernels import geometry, reference
from kdx.kernels.decomposition import context_shares
from kdx.kernels.positions import PositionProducts
from tests import oracle


def inputs(n: int, channels: int, positions: int, dtype: torch.dtype, apart: float = 0.1) -> tuple[Tensor, Tensor]:
    """Features [n, C, P] far from the origin, and the U-centred matrices [2, n, n] of related rows. Images 1 and 2 are equal, and images
    0 and 3 are ``apart`` at one element."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, channels, positions, generator=generator, dtype=torch.float64) + 3
    x[2] = x[1]
    x[3] = x[0]
    x[3, -1, -1] += apart
    rows = torch.stack([x.flatten(1)[:, part] + torch.randn(n, 1, generator=generator) for part in (slice(0, 4), slice(1, 5))])
    return x.to(dtype), geometry.u_centered(geometry.distances(rows))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "channels", "positions"), [(7, 9, 5), (19, 33, 12), (12, 12, 1), (33, 5, 6)])
def test_distances_and_shares_equal_the_definitions(n: int, channels: int, positions: int, dtype: torch.dtype) -> None:
    x, matrices = inputs(n, channels, positions, dtype)
    products = PositionProducts.of(x)
    assert (products.products is None) == (n > channels)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert oracle.error(products.distances, reference.distances(x.double().flatten(1))) < tolerance
    actual = products.shares(matrices, [slice(0, n)])
    assert actual.shape == (1, 2, n, positions)
    for shares, matrix in zip(actual[0], matrices, strict=True):
        assert oracle.error(shares, reference.shares(x, matrix)) < 10 * tolerance


@pytest.mark.parametrize("apart", [1e-8, 1e-5, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_at_nearly_zero_distance_keep_their_digits(apart: float, dtype: torch.dtype) -> None:
    x, matrices = inputs(29, 40, 6, torch.float64, apart)
    x = (x - 3).to(dtype)
    products = PositionProducts.of(x)
    assert oracle.error(products.distances[0, 3], (x[0] - x[3]).double().norm()) < 1e-6 and products.distances[1, 2] == 0
    pair = torch.zeros(1, 29, 29, dtype=torch.float64)
    pair[0, 0, 3] = pair[0, 3, 0] = 1
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    # Alone, a pair that is barely far enough for the products has the rounding of the norms, divided by its squared distance.
    for matrix, allowed in ((matrices[:1], tolerance), (pair, 100 * tolerance)):
        actual = products.shares(matrix, [slice(0, 29)])[0, 0]
        assert oracle.error(actual, reference.shares(x, matrix[0])) < allowed


@pytest.mark.parametrize("close", [False, True])
def test_contexts_add_up(close: bool) -> None:
    """Also where most pairs are close: then the shares are computed in float64."""
    x, matrices = inputs(20, 30, 6, torch.float32)
    if close:
        x = 1e-3 * (x - 3) + torch.arange(20)[:, None, None] % 2
    products = PositionProducts.of(x)
    contexts = [slice(0, 20, 2), slice(1, 20, 2), slice(3, 9)]
    actual = products.shares(matrices, contexts)
    exact = geometry.distances(x.double().flatten(1))
    assert oracle.error(actual, context_shares(x.double(), exact, matrices, contexts)) < 3e-5
    assert oracle.error(actual[:2].sum(0), products.shares(matrices, [slice(0, 20)])[0]) < 3e-6


def test_products_in_steps_are_the_products_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = inputs(6, 50, 7, torch.float64)
    whole = PositionProducts.of(x).products
    monkeypatch.setattr("kdx.kernels.positions.parts_per_step", lambda count, size, device: 7)
    parts = PositionProducts.of(x).products
    assert whole is not None and parts is not None and oracle.error(parts, whole) < 1e-14
