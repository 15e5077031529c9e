"""The kernels of inner products, run on the CPU, against the definition and the PyTorch geometry."""

from __future__ import annotations

import pytest
import torch

from kdx.kernels import fused, geometry
from tests import oracle
from tests.host import HostLauncher, Order, running
from tests.kernels.inputs import EXACT, defined, matrices


@pytest.mark.parametrize(
    ("batches", "count", "n", "dtype"),
    [
        (2, 3, 4, torch.float32),
        (1, 1, 5, torch.float32),
        (1, 2, 19, torch.float64),
        (2, 5, 33, torch.float32),
        (1, 9, 20, torch.float64),
        (1, 4, 111, torch.float32),
        (1, 6, 112, torch.float32),
    ],
)
def test_products_are_the_definition(batches: int, count: int, n: int, dtype: torch.dtype, order: Order) -> None:
    d = matrices(batches, count, n)
    with running(HostLauncher(order)):
        actual = fused.products(d.to(dtype))
    assert oracle.error(actual.inner, defined(d)) < EXACT
    assert oracle.error(actual.inner, geometry.products(geometry.u_centered(d))) < EXACT
    assert oracle.error(actual.row_sums, d.sum(-1)) < 1e-14
    assert oracle.error(actual.totals, d.sum((-1, -2))) < 1e-14
    assert oracle.error(actual.squares, d.square().sum((-1, -2))) < 1e-14


def test_products_at_any_strides() -> None:
    d = matrices(2, 3, 13).float()
    memory = torch.full((3, 2, 171), torch.nan)
    permuted = memory[:, :, 1:170].transpose(0, 1).unflatten(2, (13, 13))
    permuted.copy_(d)
    assert permuted.stride(0) == 171 and permuted.data_ptr() % 16
    with running():
        actual = fused.products(d).inner
        assert torch.equal(fused.products(permuted).inner, actual)
        assert torch.equal(fused.products(d.mT).inner, actual)
        assert torch.equal(fused.products(d[:, :1].expand(2, 2, 13, 13)).inner, actual[:, :1, :1].expand(2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_distances_that_are_large_beside_their_spread(dtype: torch.dtype) -> None:
    """Centring leaves a ten-thousandth of the sum of squares."""
    d = (1e3 * (1 - torch.eye(33, dtype=torch.float64)) + matrices(1, 3, 33)).to(dtype).double()
    with running():
        assert oracle.error(fused.products(d.to(dtype)).inner, defined(d)) < EXACT


def test_a_matrix_that_centring_sends_to_zero_has_norm_zero() -> None:
    u = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    added = (u[:, None] + u[None, :]).fill_diagonal_(0)
    with running():
        actual = fused.products(torch.stack((added, matrices(1, 1, 9)[0, 0]))[None]).inner[0]
    assert actual[0, 0] == 0 and actual[1, 1] > 0 and actual[0, 1].abs() < 1e-14


@pytest.mark.parametrize("multiprocessors", [1, 50])
def test_products_by_few_blocks_and_by_many(multiprocessors: int) -> None:
    d = matrices(1, 3, 70)
    with running(HostLauncher(multiprocessors=multiprocessors)):
        assert oracle.error(fused.products(d.float()).inner, defined(d)) < EXACT
