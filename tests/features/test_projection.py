"""Random projections of channels: distances keep their expected value, within the stated error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx.features.projection import projected, projected_channels
from kdx.kernels import geometry


def squares(x: Tensor) -> Tensor:
    return geometry.distances(x.flatten(1)).square()


@pytest.mark.parametrize("channels", [16, 64])
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
