"""The kernels of shares, run on the CPU, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx.kernels import decomposition, fused_shares, geometry, reference
from tests import oracle
from tests.host import HostLauncher, Order, running
from tests.kernels.inputs import SINGLE


def inputs(n: int, channels: int, positions: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, C, P] far from the origin, their distances, and the U-centred matrix of related rows.

    Images 1 and 2 are equal, and the last image is close to image 0.
    """
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, channels, positions, generator=generator) + 5
    x[2] = x[1]
    x[-1] = x[0] + 0.01 * torch.randn(channels, positions, generator=generator)
    x = x.to(dtype)
    g = geometry.u_centered(geometry.distances(x.double().flatten(1)[:, :7] + torch.randn(n, 1, generator=generator)))
    return x, geometry.distances(x.double().flatten(1)), g


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 1, 1), torch.float32),
        ((5, 7, 3), torch.float16),
        ((9, 2049, 1), torch.float32),
        ((17, 33, 16), torch.bfloat16),
        ((33, 6, 17), torch.float32),
        ((35, 5, 49), torch.float16),
        ((19, 64, 49), torch.float32),
        ((6, 3, 197), torch.bfloat16),
        ((67, 2, 5), torch.float32),
    ],
)
def test_shares_equal_the_definition(shape: tuple[int, int, int], dtype: torch.dtype, order: Order) -> None:
    x, d, g = inputs(*shape, dtype)
    with running(HostLauncher(order)):
        actual = fused_shares.shares(x, d, g)
    assert actual.dtype == torch.float64
    assert oracle.error(actual, reference.shares(x, g)) < SINGLE
    assert oracle.error(actual.sum(), geometry.dot(d, g)) < 10 * SINGLE


@pytest.mark.parametrize("multiprocessors", [1, 200])
def test_channels_by_few_blocks_and_by_many(multiprocessors: int) -> None:
    x, d, g = inputs(9, 130, 15)
    with running(HostLauncher(multiprocessors=multiprocessors)):
        actual = fused_shares.shares(x, d, g)
    assert oracle.error(actual, reference.shares(x, g)) < SINGLE


@pytest.mark.parametrize("rows", [1, 7, 17])
def test_strips_of_images_give_the_same_shares(rows: int, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    x, d, g = inputs(19, 3, 10)
    with running(HostLauncher(order)):
        monkeypatch.setattr(fused_shares, "_SQUARES", rows * 19 * 10)
        actual = fused_shares.shares(x, d, g)
    assert oracle.error(actual, reference.shares(x, g)) < SINGLE


@pytest.mark.parametrize("apart", [1e-6, 1e-3])
def test_pairs_at_nearly_zero_distance_keep_their_digits(apart: float) -> None:
    x, _, g = inputs(9, 4, 6)
    x -= 5
    x[1] = x[0]
    x[1, 2, 3] += apart
    x[2] = x[0]  # a distance of exactly zero adds nothing
    d = geometry.distances(x.double().flatten(1))
    assert 0 < d[0, 1] < 2 * apart and d[0, 2] == 0
    alone = torch.zeros_like(g)
    alone[0, 1] = alone[1, 0] = 1
    with running():
        for matrix in (g, alone):
            assert oracle.error(fused_shares.shares(x, d, matrix), reference.shares(x, matrix)) < SINGLE


def test_the_origin_and_constant_channels_and_positions_change_nothing() -> None:
    x, d, g = inputs(19, 5, 12)
    x = (8 * x).round() / 8  # exact in float32 after the shift
    d = geometry.distances(x.double().flatten(1))
    constant = torch.cat([x, torch.full((19, 1, 12), 7.0)], 1)
    with running():
        expected = fused_shares.shares(x, d, g)
        for same in (x + 64, constant):
            assert oracle.error(fused_shares.shares(same, d, g), expected) < SINGLE
        x[:, :, 4] = 1
        assert fused_shares.shares(x, geometry.distances(x.double().flatten(1)), g)[:, 4].abs().max() == 0


def test_strided_features_and_matrices() -> None:
    x, d, g = inputs(9, 12, 35)
    wide = torch.zeros(9, 18, dtype=torch.float64)
    wide[:, ::2] = g
    with running():
        actual = fused_shares.shares(x.mT.contiguous().mT, d.mT, wide[:, ::2])
    assert oracle.error(actual, decomposition.shares(x, d, g)) < 10 * SINGLE


def test_wrong_shapes_and_types_are_refused() -> None:
    x, d, g = inputs(5, 3, 4)
    for features, distances, matrix in ((x.double(), d, g), (x[0], d, g), (x, d[:4], g), (x, d, g.float()), (x.expand(5, 3, 4)[:4], d, g)):
        with running(), pytest.raises(ValueError, match="must"):
            fused_shares.shares(features, distances, matrix)
    many = torch.zeros(1, 1, 1).expand(5, 1 << 15, 1 << 13)
    with running(), pytest.raises(ValueError, match="fewer than"):
        fused_shares.shares(many, d, g)
