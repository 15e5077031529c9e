"""The kernels of maps, run on the CPU, against the definition and the PyTorch geometry."""

from __future__ import annotations

import pytest
import torch

from kdx.kernels import fused_maps, geometry, rounding
from tests import oracle
from tests.host import HostLauncher, Order, running
from tests.kernels.inputs import SINGLE


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1), torch.float32),
        ((2049, 1, 1), torch.float32),
        ((64, 7, 7), torch.float32),
        ((64, 7, 7), torch.bfloat16),
        ((2049, 3, 5), torch.float16),
        ((2048, 3, 5), torch.float16),
        ((3, 17, 17), torch.float32),
        ((4, 56, 56), torch.float32),
        ((3, 56, 56), torch.float16),
    ],
)
def test_maps_are_those_of_the_geometry(shape: tuple[int, int, int], dtype: torch.dtype, order: Order) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, *shape, generator=generator).to(dtype)
    weights = torch.randn(2, shape[0], generator=generator, dtype=torch.float64)
    with running(HostLauncher(order)):
        maps = fused_maps.cam(features, weights)
    expected = (weights[:, :, None, None] * features.double()).sum(1).relu()
    assert oracle.error(maps, expected) < SINGLE
    assert oracle.error(maps, geometry.cam(features, weights)) < 10 * SINGLE


@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_maps_by_few_blocks_and_by_many(multiprocessors: int) -> None:
    features = torch.randn(1, 320, 7, 7, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(1, 320, generator=torch.Generator().manual_seed(1))
    launcher = HostLauncher(multiprocessors=multiprocessors)
    with running(launcher):
        maps = fused_maps.cam(features, weights)
    assert oracle.error(maps, geometry.cam(features.double(), weights)) < SINGLE


def test_maps_of_strided_and_misaligned_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features, weights = torch.randn(3, 12, 5, 7, generator=generator), torch.randn(3, 24, generator=generator)[:, ::2]
    shifted = torch.empty(features.numel() + 1)[1:].view(features.shape).copy_(features)
    assert shifted.data_ptr() % 16
    expected = geometry.cam(features.double(), weights)
    with running():
        for variant in (features, features.contiguous(memory_format=torch.channels_last), shifted):
            assert oracle.error(fused_maps.cam(variant, weights), expected) < SINGLE


def test_a_constant_map_is_constant() -> None:
    features = torch.randn(3, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    features[1] = 2.0
    with running():
        assert (fused_maps.cam(features, torch.ones(3, 5))[1] == 10).all()


def test_nan_stays_in_a_map() -> None:
    features = torch.ones(1, 3, 2, 2)
    features[0, 1, 0, 1] = torch.nan
    with running():
        map_ = fused_maps.cam(features, torch.ones(1, 3))[0]
    assert map_[0, 1].isnan() and map_[[0, 1, 1], [0, 0, 1]].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 1), (2, 67, 5), (3, 11, 32), (2, 40, 33), (1, 2, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_are_those_of_float64(shape: tuple[int, int, int], dtype: torch.dtype, order: Order) -> None:
    images, channels, positions = shape
    features = torch.randn(images, channels, 1, positions, generator=torch.Generator().manual_seed(1)).to(dtype)
    with running(HostLauncher(order)):
        actual = fused_maps.means(features)
        strided = fused_maps.means(features.mT)
    assert actual.dtype == torch.float64 and oracle.error(actual, features.double().mean((2, 3))) < 1e-14
    assert torch.equal(actual, strided)


@pytest.mark.parametrize("shape", [(2, 35, 8, 8), (3, 70, 7, 7), (2, 5, 4, 4), (2, 33, 14, 14), (1, 3, 13, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means_with_probes(shape: tuple[int, int, int, int], dtype: torch.dtype, order: Order) -> None:
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with running(HostLauncher(order)):
        actual = fused_maps.means_with_probes(features, rounding.drawn(len(features), 3))
        misaligned = torch.empty(features.numel() + 1, dtype=dtype)[1:].view(shape).copy_(features)
        assert torch.equal(fused_maps.means(misaligned), fused_maps.means(features))
    expected = rounding.with_probes(geometry.gap(features), features, seed=3)
    assert oracle.error(actual[:, : -rounding.PROBES], expected[:, : -rounding.PROBES]) < 1e-14
    assert oracle.error(actual, expected) < 10 * SINGLE


def test_maps_of_weights_that_float32_cannot_represent(order: Order) -> None:
    """Weights of many magnitudes, with the rounding that the geometry measures in them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 20, 3, 3, generator=generator)
    weights = torch.randn(2, 4, 20 + rounding.PROBES, generator=generator, dtype=torch.float64)
    weights[0, 1] *= 1e-20
    weights[0, 2] = 0
    weights[1, 0, 20:] *= 1e9  # rounding larger than the weights
    weights[1, 3] *= 1e18
    with running(HostLauncher(order)):
        scaled = fused_maps.scaled_weights(weights, torch.float32, 9)
        maps = torch.stack([fused_maps.scaled_cam(features, scaled, number) for number in range(2)])
    for number, rows in enumerate(weights):
        normal, exponents = geometry.split_exponent(rows[:, :20])
        assert oracle.error(maps[number], geometry.times_power(geometry.cam(features, normal), exponents)) < 10 * SINGLE
        assert torch.equal(scaled.exponents[number], exponents) and torch.equal(scaled.plain[number], rows[:, :20].float())
        assert torch.equal(scaled.real[number] == 1, rounding.exceed_rounding(rows, torch.float32, 9))
