"""Ranks of pixels and similarities of maps, against slow computations by definition, SciPy and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from kdx.evaluate.ranking import pixel_ranks, rank_correlation, structural_similarity


def random_maps(seed: int, n: int = 5, h: int = 9, w: int = 11, levels: int = 1000) -> Tensor:
    return torch.randint(-levels, levels, (n, h, w), generator=torch.Generator().manual_seed(seed)).double()


def test_ranks_follow_the_values() -> None:
    maps = torch.stack([torch.randperm(99, generator=torch.Generator().manual_seed(seed)).reshape(9, 11) for seed in range(5)]).double()
    assert torch.equal(pixel_ranks(maps - 40, (9, 11)), 98 - maps.long())


def test_equal_values_have_a_random_order_that_the_seed_and_the_number_determine() -> None:
    maps = random_maps(0, levels=3)
    ranks = pixel_ranks(maps, (9, 11), seed=1)
    for values, row in zip(maps.flatten(1), ranks.flatten(1), strict=True):
        assert sorted(row.tolist()) == list(range(99))
        assert bool((values[row.argsort()].diff() <= 0).all())
    assert torch.equal(ranks, pixel_ranks(maps, (9, 11), seed=1)) and not torch.equal(ranks, pixel_ranks(maps, (9, 11), seed=2))
    assert torch.equal(ranks[[3, 1]], pixel_ranks(maps[[3, 1]], (9, 11), seed=1, numbers=[3, 1]))
    assert not torch.equal(*pixel_ranks(maps[[0, 0]], (9, 11)))


def test_every_pixel_of_a_uniform_map_is_equally_often_first() -> None:
    """400 orders of 12 pixels: chi-squared with 11 degrees of freedom exceeds 31.3 with probability 0.001."""
    first = (pixel_ranks(torch.full((400, 2, 2), 0.1), (3, 4)) == 0).flatten(1).sum(0).double()
    assert float(((first - 400 / 12) ** 2 / (400 / 12)).sum()) < 31.3


@pytest.mark.parametrize("levels", [1000, 2])
def test_rank_correlation(levels: int) -> None:
    a, b = random_maps(0, levels=levels), random_maps(1, levels=levels)
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(a, (a / 3000).exp()).tolist() == pytest.approx([1] * 5)
    assert rank_correlation(a, -a.transpose(1, 2).contiguous().transpose(1, 2)).tolist() == pytest.approx([-1] * 5)
    assert bool(rank_correlation(a, torch.ones_like(a)).isnan().all())


def slow_similarity(a: Tensor, b: Tensor) -> float:
    """SSIM of two maps in [0, 1], window by window."""
    values = []
    for y in range(a.shape[0] - 6):
        for x in range(a.shape[1] - 6):
            p, q = (values[y : y + 7, x : x + 7].flatten().numpy() for values in (a, b))
            covariance = np.cov(p, q)
            top = (2 * p.mean() * q.mean() + 1e-4) * (2 * covariance[0, 1] + 9e-4)
            values.append(top / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (covariance[0, 0] + covariance[1, 1] + 9e-4)))
    return float(np.mean(values))


def scaled_pairs() -> tuple[Tensor, Tensor]:
    a = random_maps(0, 3)
    return tuple((m - m.amin((1, 2), True)) / (m.amax((1, 2), True) - m.amin((1, 2), True)) for m in (a, a + random_maps(1, 3)))  # type: ignore[return-value]


def test_structural_similarity() -> None:
    a, b = scaled_pairs()
    expected = [slow_similarity(*pair) for pair in zip(a, b, strict=True)]
    assert structural_similarity(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert structural_similarity(5 * a - 3, b / 7).tolist() == pytest.approx(expected, abs=1e-12)
    assert structural_similarity(a, a).tolist() == pytest.approx([1] * 3)


def test_structural_similarity_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = scaled_pairs()
    expected = [metrics.structural_similarity(x.numpy(), y.numpy(), data_range=1) for x, y in zip(a, b, strict=True)]
    assert structural_similarity(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_mistakes() -> None:
    maps = random_maps(0)
    with pytest.raises(ValueError, match="7 x 7"):
        structural_similarity(maps[:, :6], maps[:, :6])
    with pytest.raises(ValueError, match="both be"):
        rank_correlation(maps, maps[:2])
    with pytest.raises(ValueError, match="5 maps and 2 numbers"):
        pixel_ranks(maps, (9, 11), numbers=[0, 1])
    with pytest.raises(ValueError, match="finite"):
        pixel_ranks(maps / 0, (9, 11))
