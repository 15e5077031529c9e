"""Random projections: distances keep their expected value, within the stated error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx.features.projection import Sketch, projected, projected_channels
from kdx.kernels import geometry


def squares(x: Tensor) -> Tensor:
    return geometry.distances(x.flatten(1)).square()


@pytest.mark.parametrize("channels", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_squared_distances_have_the_stated_error_if_all_differences_have_one_direction(channels: int) -> None:
    """The worst case: every image is a multiple of one vector of channels."""
    x = torch.arange(8.0)[:, None, None, None] * torch.randn(1, 200, 1, 1, generator=torch.Generator().manual_seed(0))
    ratios = torch.stack([squares(projected(x, channels, seed, "student", "layer"))[0, 1:] / squares(x)[0, 1:] for seed in range(400)])[
        :, 0
    ]
    assert float(ratios.mean()) == pytest.approx(1, abs=3 * (2 / channels / 400) ** 0.5)
    assert float(ratios.std()) == pytest.approx((2 / channels) ** 0.5, rel=0.15)


def test_distances_in_many_directions_are_more_exact() -> None:
    x = torch.randn(20, 256, 7, 7, generator=torch.Generator().manual_seed(1))
    ratio = squares(projected(x, 32, 0, "base", "layer4")) / squares(x).clamp_min(1e-9)
    off = ~torch.eye(20, dtype=torch.bool)
    assert float(ratio[off].std()) < (2 / 32) ** 0.5 / 4
    assert float(ratio[off].mean()) == pytest.approx(1, abs=0.1)


def test_the_projection_follows_from_seed_role_and_layer() -> None:
    x = torch.randn(3, 50, 2, 2)
    first = projected(x, 8, 1, "student", "layer1")
    assert torch.equal(first, projected(x, 8, 1, "student", "layer1"))
    for other in ((2, "student", "layer1"), (1, "base", "layer1"), (1, "student", "layer2")):
        assert not torch.allclose(first, projected(x, 8, *other))


def test_few_channels_are_kept_as_they_are() -> None:
    x = torch.randn(3, 8, 2, 2)
    assert projected(x, 8, 0, "student", "layer") is x and projected(x, 0, 0, "student", "layer") is x
    assert (projected_channels(8, 16), projected_channels(64, 16), projected_channels(64, 0)) == (8, 16, 64)
    assert projected(torch.randn(3, 9, 2, 2), 8, 0, "student", "layer").shape == (3, 8, 2, 2)


@pytest.mark.parametrize(("width", "size"), [(100, 32), (96, 32), (33, 32)])
def test_a_sketch_adds_signed_values_at_the_stated_places(width: int, size: int) -> None:
    """The oracle is the sum over single values."""
    sketch, x = Sketch.of(width, size, 3, "A", "layer"), torch.randn(4, width, dtype=torch.float64)
    expected = torch.zeros(4, size, dtype=torch.float64)
    for i in range(width):
        expected[:, (i + sketch.shifts[i // size]) % size] += sketch.signs[i] * x[:, i]
    assert torch.allclose(sketch(x), expected, atol=1e-12) and set(sketch.signs.tolist()) == {-1, 1}
    assert sketch(x.half()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["dense", "few values", "one block"])
def test_sketches_keep_inner_products_with_the_stated_error(kind: str) -> None:
    """Compares, over 500 sketches, the mean and standard deviation of a squared norm and the mean of an inner product with the formulas."""
    size, count = 16, 500
    x = torch.randn(2, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "few values":
        x[:, 5:155] = 0
    if kind == "one block":
        x[:, size:] = 0
    values = torch.stack([Sketch.of(160, size, seed, "A", "fc")(x) for seed in range(count)])
    norm, blocks = float(x[0].square().sum()), x[0].unflatten(0, (-1, size)).square().sum(1)
    deviation = (2 / size * (1 - float(blocks.square().sum()) / norm**2)) ** 0.5
    squares = values[:, 0].square().sum(1) / norm
    assert deviation <= (2 / size) ** 0.5
    assert float(squares.std()) == pytest.approx(deviation, rel=0.15, abs=1e-6)
    assert float(squares.mean()) == pytest.approx(1, abs=4 * deviation / count**0.5 + 1e-6)
    products = (values[:, 0] * values[:, 1]).sum(1)
    assert float(products.mean()) == pytest.approx(float(x[0] @ x[1]), abs=4 * float(products.std()) / count**0.5 + 1e-4)


def test_sketches_of_two_networks_are_independent() -> None:
    one, other = (Sketch.of(64, 8, 0, name, "fc") for name in ("A", "B"))
    assert not torch.equal(one.signs, other.signs) and torch.equal(one.signs, Sketch.of(64, 8, 0, "A", "fc").signs)
