"""Insertion, deletion and ROAD: how a score of the image changes as pixels are removed in the order of a map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from kdx.evaluate.ranking import generator_of, pixel_ranks
from kdx.evaluate.scoring import Scoring
from kdx.kernels.imputation import impute

Baseline = Literal["mean", "zero", "blurred"]
"""What stands in place of a removed pixel: the mean colour of its image, zero, or the blurred image."""

Order = Literal["most", "least"]
"""Which pixels are removed first: the most relevant (MoRF) or the least relevant (LeRF)."""

BLUR = 0.1
"""Standard deviation of the Gaussian blur, as a share of the image's shorter side: 22 pixels of 224."""

SHARES = tuple(percent / 100 for percent in range(10, 100, 10))
"""The shares of the pixels that ROAD removes."""


@dataclass(frozen=True, eq=False)
class Curves:
    """A score of each image as pixels are removed or inserted.

    shares [steps]: the share of the pixels that were removed (deletion, ROAD) or inserted (insertion). values [n, steps]: the score. area
    [n]: the area under each image's curve for insertion and deletion, its mean over the shares for ROAD; in the units of the score. If the
    scoring function returns k scores per image, values are [n, steps, k] and areas [n, k].
    """

    shares: Tensor
    values: Tensor
    area: Tensor


def deletion(
    scoring: Scoring,
    images: Tensor,
    maps: Tensor,
    *,
    steps: int = 32,
    baseline: Baseline = "mean",
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Curves:
    """The deletion curve: the score as the most relevant pixels are removed first, and the area under it (trapezoids).

    At step k of ``steps``, the round(k h w / steps) pixels that the map ranks highest (`pixel_ranks`, with random order among equal values)
    are replaced by the baseline; at the end all are. Source: Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box
    Models", BMVC 2018, who replace by zero after normalisation, which is the mean colour of their data set.

    scoring: `Scoring`. images: [n, 3, h, w]. maps: [n, H, W] of any size. numbers: those of the images in their set, as in `pixel_ranks`;
    with them, no result depends on the division into batches. For a probability, areas are in [0, 1], and lower is better.

    A low area does not show that the map is right: images with holes are unlike any that the network was trained on, so it may lose the
    class because of the edges of the holes. `road` leaves less of this.

    Raises ValueError for sizes that do not fit, and for fewer than one step.
    """
    return _curve(scoring, _replaced(images, baseline), images, maps, steps, seed, numbers, removes=True)


def insertion(
    scoring: Scoring,
    images: Tensor,
    maps: Tensor,
    *,
    steps: int = 32,
    baseline: Baseline = "blurred",
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Curves:
    """The insertion curve: the score as the most relevant pixels are inserted first into the baseline, and the area under it (trapezoids).

    The reverse of `deletion`, with its arguments and source: it starts at the baseline, by default the image blurred by a Gaussian with a
    standard deviation of 0.1 of the shorter side (`BLUR`), and ends at the image. For a probability, areas are in [0, 1], and higher is
    better. The first value of the curve is the score of the baseline: where it is already high, the area says little about the map.
    """
    return _curve(scoring, _replaced(images, baseline), images, maps, steps, seed, numbers, removes=False)


def road(
    scoring: Scoring,
    images: Tensor,
    maps: Tensor,
    *,
    order: Order = "most",
    shares: Sequence[float] = SHARES,
    noise: float = 0.01,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Curves:
    """ROAD: the score after a share of the pixels is removed and imputed from the others, and its mean over the shares.

    With ``order="most"`` the most relevant pixels are removed (MoRF; lower is better), with ``"least"`` the least relevant ones, so that
    the most relevant are kept (LeRF; higher is better). round(share h w) pixels are removed, and `kdx.impute` replaces them by the
    weighted mean of their neighbours. noise: the standard deviation of the normal noise that is added to imputed pixels, in units of the
    images. Source: Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022, who count right
    predictions; the value here is that of ``scoring``, as in pytorch-grad-cam. Other arguments are those of `deletion`.

    Imputation hides the edges of the holes and not what their surroundings predict: a smooth region that matters can be restored from its
    border. The two orders answer different questions and may rank maps differently.

    Raises ValueError for sizes that do not fit, and for shares outside (0, 1); KdxError for pixels that are not finite.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares of removed pixels are in (0, 1), not {list(shares)}")
    ranks, numbers = _ranks(images, maps, seed, numbers)
    pixels = ranks[0].numel()
    if order == "least":
        ranks = pixels - 1 - ranks
    values = []
    for step, share in enumerate(shares):
        kept = (ranks >= round(share * pixels)).to(images.device)
        imputed = impute(images, kept)
        if noise:
            drawn = [torch.randn(images.shape[1:], generator=generator_of(number, seed, step)) for number in numbers]
            imputed = imputed + noise * torch.stack(drawn).to(imputed) * ~kept[:, None]
        values.append(_values(scoring, imputed))
    curve = torch.stack(values, 1)
    return Curves(torch.tensor(shares, dtype=torch.float64), curve, curve.mean(1))


def road_difference(keep: Curves, remove: Curves) -> Tensor:
    """(LeRF - MoRF) / 2 of ROAD, [n]: higher is better, and 0 is expected of a random order. Of a probability, it is in [-1/2, 1/2]."""
    return (keep.area - remove.area) / 2


def blurred(images: Tensor, share: float = BLUR) -> Tensor:
    """Images [n, c, h, w] blurred by a Gaussian whose standard deviation is ``share`` of the shorter side; border pixels are repeated."""
    sigma = share * min(images.shape[2:])
    radius = math.ceil(3 * sigma)
    weights = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    kernel = (weights / weights.sum()).to(images)
    planes = pad(images.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    rows = conv2d(planes, kernel[None, None, None])
    return conv2d(rows, kernel[None, None, :, None])[:, 0].reshape(images.shape)


def _replaced(images: Tensor, baseline: Baseline) -> Tensor:
    if baseline == "blurred":
        return blurred(images)
    return images.mean((2, 3), keepdim=True).expand_as(images) if baseline == "mean" else torch.zeros_like(images)


def _curve(
    scoring: Scoring,
    baseline: Tensor,
    images: Tensor,
    maps: Tensor,
    steps: int,
    seed: int,
    numbers: Sequence[int] | None,
    *,
    removes: bool,
) -> Curves:
    if steps < 1:
        raise ValueError(f"a curve has at least one step, not {steps}")
    ranks, _ = _ranks(images, maps, seed, numbers)
    ranks = ranks[:, None].to(images.device)
    first, second = (baseline, images) if removes else (images, baseline)
    counts = list(_counts(ranks[0].numel(), steps))
    values = torch.stack([_values(scoring, torch.where(ranks < count, first, second)) for count in counts], 1)
    area = (values[:, :-1] + values[:, 1:]).mean(1) / 2
    return Curves(torch.tensor(counts, dtype=torch.float64) / counts[-1], values, area)


def _counts(pixels: int, steps: int) -> Iterator[int]:
    """How many pixels have changed at each step, from none to all."""
    return (round(step * pixels / steps) for step in range(steps + 1))


def _ranks(images: Tensor, maps: Tensor, seed: int, numbers: Sequence[int] | None) -> tuple[Tensor, Sequence[int]]:
    if images.ndim != 4 or len(images) != len(maps):
        raise ValueError(f"images must be [n, 3, h, w] with one map each, not {list(images.shape)} with {len(maps)} maps")
    numbers = range(len(images)) if numbers is None else numbers
    return pixel_ranks(maps, (images.shape[2], images.shape[3]), seed=seed, numbers=numbers), numbers


def _values(scoring: Scoring, images: Tensor) -> Tensor:
    with torch.no_grad():
        values = scoring(images)
    if values.ndim not in (1, 2) or len(values) != len(images):
        raise ValueError(f"a scoring function returns [{len(images)}] or [{len(images)}, k], not {list(values.shape)}")
    return values.detach().double().cpu()
