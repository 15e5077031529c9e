"""The order of an image's pixels by relevance, and the similarity of two maps of the same image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kdx.kernels import geometry
from kdx.maps.scaling import scaled

NamedMaps = Mapping[str, Tensor]
"""Maps [n, H, W] of the same images by name: those that one pass of the networks gives."""

_WINDOW = 7
"""Side of the window of SSIM, in positions: the default of scikit-image."""

_STABILISERS = 0.01, 0.03
"""K1 and K2 of Wang et al. 2004."""


def generator_of(number: int, seed: int, *purpose: int) -> torch.Generator:
    """A generator for the image of this number, so that no draw depends on the batch in which the image is computed.

    purpose: numbers that separate the draws of one image.
    """
    state = seed
    for value in (number, *purpose):
        state = (state * 1_000_003 + value + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(state)


def pixel_ranks(maps: Tensor, size: tuple[int, int], *, seed: int = 0, numbers: Sequence[int] | None = None) -> Tensor:
    """The rank [n, h, w] of every pixel: 0 for the pixel with the largest value of the image's map.

    maps: [n, H, W] of any size, signed or not; each is scaled to [0, 1] and resized to ``size`` (h, w) by bilinear interpolation. Among
    equal values the order is random, and determined by ``seed`` and the number of the image: a uniform map gives a random order. numbers:
    the numbers of the images [n] in their data set, by default 0 to n - 1; with them, a part of a set gives the ranks of the whole set.

    Raises ValueError for maps that are not [n, H, W] of finite numbers, and for numbers that are not one per map.
    """
    if maps.ndim != 3 or not bool(maps.isfinite().all()):
        raise ValueError(f"maps must be [n, H, W] of finite numbers, not {list(maps.shape)}")
    images = range(len(maps)) if numbers is None else numbers
    if len(images) != len(maps):
        raise ValueError(f"there are {len(maps)} maps and {len(images)} numbers")
    values = scaled(maps.detach().cpu().double(), size).flatten(1)
    ranks = torch.empty(values.shape, dtype=torch.int64)
    positions = torch.arange(values.shape[1])
    for row, number in enumerate(images):
        shuffled = torch.randperm(values.shape[1], generator=generator_of(int(number), seed))
        order = shuffled[values[row, shuffled].argsort(descending=True, stable=True)]
        ranks[row, order] = positions
    return ranks.reshape(len(maps), *size)


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's rank correlation [n] over the positions of maps [n, H, W] and other maps of the same images.

    Equal values share their mean rank. Range -1 to 1. NaN where a map is constant, because it orders no positions. It ignores how strong
    the maps are, and a correlation of few positions varies strongly by chance.
    """
    a, b = (_mean_ranks(values) for values in _pair(maps, others))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def structural_similarity(maps: Tensor, others: Tensor) -> Tensor:
    """The structural similarity SSIM [n] of maps [n, H, W] and other maps of the same images, each map scaled to [0, 1] first.

        SSIM = mean over windows of (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2))

    with means m, sample variances s^2 and covariance s_ab in windows of 7 x 7 positions inside the map, c1 = 0.01^2 and c2 = 0.03^2.
    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004. Range -1 to 1. A
    constant map is zero everywhere after scaling. Two smooth maps of one image are similar also if they have nothing to do with each other.

    Raises ValueError for maps smaller than 7 x 7: resize both to the size of the image.
    """
    _pair(maps, others)
    if min(maps.shape[1:]) < _WINDOW:
        raise ValueError(f"SSIM needs maps of at least {_WINDOW} x {_WINDOW} positions, not {list(maps.shape[1:])}")
    a, b = (geometry.scaled(values.detach().double())[:, None] for values in (maps, others))

    def mean(values: Tensor) -> Tensor:
        return avg_pool2d(values, _WINDOW, 1)

    count = _WINDOW**2
    mean_a, mean_b = mean(a), mean(b)
    sample = count / (count - 1)
    variance_a, variance_b = sample * (mean(a * a) - mean_a**2), sample * (mean(b * b) - mean_b**2)
    covariance = sample * (mean(a * b) - mean_a * mean_b)
    c1, c2 = (k**2 for k in _STABILISERS)
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return similarity.mean((1, 2, 3))


def _pair(maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    if maps.ndim != 3 or maps.shape != others.shape:
        raise ValueError(f"the maps must both be [n, H, W], not {list(maps.shape)} and {list(others.shape)}")
    return maps.detach().double().flatten(1), others.detach().double().flatten(1)


def _mean_ranks(values: Tensor) -> Tensor:
    """The ranks [n, d] of each row's values, with the mean rank for equal values."""
    ordered = values.sort(1).values.contiguous()
    below, through = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (below + through).double() / 2
