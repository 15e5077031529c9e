"""The kernels of distances and shares by position, run on the CPU, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx.kernels import fused_shares, geometry, reference
from kdx.kernels.decomposition import context_shares
from kdx.kernels.fused_shares import PositionSquares
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


def shares(x: Tensor, g: Tensor) -> Tensor:
    return PositionSquares.of(x).shares(g[None], [slice(0, len(x))])[0, 0]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 1, 1), torch.float32),
        ((5, 7, 3), torch.float16),
        ((9, 2049, 1), torch.float32),
        ((17, 33, 16), torch.bfloat16),
        ((33, 6, 17), torch.float32),
        pytest.param((35, 5, 49), torch.float16, marks=pytest.mark.slow),
        ((19, 64, 49), torch.float32),
        ((6, 3, 197), torch.bfloat16),
        pytest.param((67, 2, 5), torch.float32, marks=pytest.mark.slow),
    ],
)
def test_shares_equal_the_definition(shape: tuple[int, int, int], dtype: torch.dtype, order: Order) -> None:
    x, d, g = inputs(*shape, dtype)
    with running(HostLauncher(order)):
        actual = shares(x, g)
    assert actual.dtype == torch.float64
    assert oracle.error(actual, reference.shares(x, g)) < SINGLE
    assert oracle.error(actual.sum(), geometry.dot(d, g)) < 10 * SINGLE


@pytest.mark.parametrize("rows", [1, 7, 17])
def test_strips_of_images_give_the_same_shares(rows: int, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, g = inputs(19, 3, 10)
    with running(HostLauncher(order)):
        monkeypatch.setattr(fused_shares, "_SQUARES", rows * 19 * 10)
        actual = shares(x, g)
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
            assert oracle.error(shares(x, matrix), reference.shares(x, matrix)) < SINGLE


def test_the_origin_and_constant_channels_and_positions_change_nothing() -> None:
    x, _, g = inputs(19, 5, 12)
    x = (8 * x).round() / 8  # exact in float32 after the shift
    constant = torch.cat([x, torch.full((19, 1, 12), 7.0)], 1)
    with running():
        expected = shares(x, g)
        for same in (x + 64, constant):
            assert oracle.error(shares(same, g), expected) < SINGLE
        x[:, :, 4] = 1
        assert shares(x, g)[:, 4].abs().max() == 0


def test_strided_features_and_matrices() -> None:
    x, _, g = inputs(9, 12, 35)
    wide = torch.zeros(9, 18, dtype=torch.float64)
    wide[:, ::2] = g
    with running():
        actual = shares(x.mT.contiguous().mT, wide[:, ::2])
    assert oracle.error(actual, reference.shares(x, g)) < SINGLE


@pytest.mark.parametrize("fits", [True, False])
def test_many_matrices_and_contexts_in_one_pass(fits: bool, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    x, d, g = inputs(18, 5, 7)
    matrices = torch.stack([g, g.roll((1, 1), (0, 1)), g @ g])
    contexts = [slice(0, 18, 2), slice(1, 18, 2), slice(4, 9)]
    with running(HostLauncher(order)):
        if not fits:
            monkeypatch.setattr(fused_shares, "_SQUARES", 8 * 18 * 7)
        positions = PositionSquares.of(x)
        actual = positions.shares(matrices, contexts)
    assert (positions.squares is not None) == fits and oracle.error(positions.distances, d) < (SINGLE if fits else 1e-5)
    expected = context_shares(x.double(), d, matrices, contexts)
    assert actual.shape == (3, 3, 18, 7) and oracle.error(actual, expected) < SINGLE
    assert oracle.error(actual[:2].sum(0)[0], reference.shares(x, g)) < SINGLE


def test_wrong_shapes_and_types_are_refused() -> None:
    x, _, g = inputs(5, 3, 4)
    for features, matrix in ((x.double(), g), (x, g[:4]), (x, g.float()), (x[:4], g)):
        with running(), pytest.raises(ValueError, match="must"):
            shares(features, matrix)
    many = torch.zeros(1, 1, 1).expand(5, 1 << 16, 1 << 15)
    with running(), pytest.raises(ValueError, match="fewer than"):
        shares(many, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_networks_and_their_means_from_one_read(dtype: torch.dtype, order: Order) -> None:
    features = [inputs(18, 35, 49, dtype)[0], inputs(18, 35, 49, dtype)[0].flip(2) - 3]
    means = [torch.full((18, 40), 7.0, dtype=torch.float64), None]
    with running(HostLauncher(order)):
        both = PositionSquares.of_each(features, means)
    for x, positions in zip(features, both, strict=True):
        assert oracle.error(positions.distances, geometry.distances(x.double().flatten(1))) < SINGLE
    assert means[0] is not None and oracle.error(means[0][:, :35], features[0].double().mean(2)) < 1e-14
    assert (means[0][:, 35:] == 7).all()


def test_networks_that_differ_in_shape_and_means_of_many_positions_are_refused() -> None:
    x = torch.zeros(4, 2, 65)
    with running(), pytest.raises(ValueError, match="alike"):
        PositionSquares.of_each([x, x[:, :1]], [None, None])
    with running(), pytest.raises(ValueError, match="few positions"):
        PositionSquares.of_each([x], [torch.zeros(4, 2, dtype=torch.float64)])
