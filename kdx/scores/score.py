"""Scores and contrasts with their intervals, and the statistics that compute scores from inner products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.kernels.moments import Moments, upper
from kdx.roles import StatisticName
from kdx.scores.uncertainty import interval, spread

Estimator = Literal["unbiased", "biased"]

Statistic = Callable[[Tensor], Tensor]
"""Inner products [..., k, k] -> values [...]."""


@dataclass(frozen=True)
class Score:
    """A similarity or relevance score with its uncertainty.

    value: in [-1, 1]. With the unbiased estimator, 0 is expected for unrelated features, and 1 means the same geometry.
    interval: the confidence interval of ``value`` over other samples of images, inside [-1, 1]; never NaN: (-1, 1) if too little is known.
    It comes from the score without single images, or without random parts of them, computed on Fisher's z scale (docs/mathematics.md has
    the formula and its measured coverage). It does not describe other trainings of the networks.
    p_value: one-sided: the share of permutations of the images, the observed order included, that score at least as high; None without
    permutations.
    n: the number of images. batches: the number of sets in which distances were measured. estimator, confidence, permutations: the
    settings of the call. p_adjusted: the p-value adjusted by Holm's method for the same score of all layers; None for a single layer.

    A score compares geometries, image pair by image pair. It does not show that one network caused the features of the other.
    """

    value: float
    interval: tuple[float, float]
    p_value: float | None
    n: int
    batches: int = 1
    estimator: Estimator = "unbiased"
    confidence: float = 0.95
    permutations: int = 0
    p_adjusted: float | None = None

    def __float__(self) -> float:
        return self.value


class Contrast(NamedTuple):
    """The difference of two scores of the same images, with its uncertainty.

    value: in [-2, 2]. interval: the confidence interval of ``value``, as for a `Score`, inside [-2, 2]; (-2, 2) if too little is known. It
    accounts for both scores being of the same images.
    """

    value: float
    interval: tuple[float, float]


def correlation(products: Tensor) -> Tensor:
    """<X,Y>/sqrt(<X,X><Y,Y>) from inner products [..., 2, 2] of (X, Y)."""
    return products[..., 0, 1] / (products[..., 0, 0] * products[..., 1, 1]).sqrt()


def semipartial(products: Tensor) -> Tensor:
    """<R,G>/sqrt(<R,R><G,G>), R = X - (<X,Y>/<Y,Y>) Y, from inner products [..., 3, 3] of (X, G, Y)."""
    residual = _projected(products)
    return residual[..., 0, 1] / (residual[..., 0, 0] * products[..., 1, 1]).sqrt()


def partial(products: Tensor) -> Tensor:
    """Like `semipartial`, but Y is projected out of G too (Szekely and Rizzo 2014)."""
    return correlation(_projected(products))


def _projected(products: Tensor) -> Tensor:
    """Inner products of X and G after Y is projected out of both."""
    xy = products[..., :2, 2]
    return products[..., :2, :2] - xy[..., :, None] * xy[..., None, :] / products[..., 2:, 2:]


STATISTICS: dict[StatisticName, Statistic] = {"correlation": correlation, "semipartial": semipartial}
"""The statistics that `kdx.roles` names."""


@dataclass(frozen=True)
class Estimate:
    """The value of a statistic of inner products, and its gradient [m] by the inner products of `kdx.kernels.moments.upper`."""

    value: float
    gradient: NDArray[np.float64]

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.gradient - other.gradient)


def estimate(statistic: Statistic, products: Tensor) -> Estimate:
    """The statistic of inner products [k, k]."""
    values, gradients = estimates(statistic, products[None])
    return Estimate(float(values), gradients[0].numpy(force=True))


def estimates(statistic: Statistic, products: Tensor) -> tuple[Tensor, Tensor]:
    """The values [c] of a statistic of inner products [c, k, k], and its gradients [c, m] as in `Estimate`."""
    rows, columns = upper(products.shape[-1], products.device)
    with torch.enable_grad():
        leaf = products[:, rows, columns].detach().requires_grad_()
        half = products.new_zeros(products.shape)
        half[:, rows, columns] = leaf
        values = statistic(half + half.triu(1).mT)
        (gradients,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradients


def summary(
    estimate: Estimate,
    moments: Moments | None,
    permuted: NDArray[np.float64] | None,
    *,
    n: int,
    batches: int,
    estimator: Estimator = "unbiased",
    confidence: float = 0.95,
) -> Score:
    """The Score of an estimate, from the moments of its inner products and the values under permutations [p]."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    value = estimate.value
    if not np.isfinite(value):
        raise ValueError("the score is not a number")  # all known causes are refused earlier
    permutations = 0 if permuted is None else len(permuted)
    p_value = None
    if permuted is not None and permutations:
        # A value that is equal up to rounding counts as at least as high, so a tie never makes a result significant.
        p_value = (1 + int((permuted >= value - 1e-12).sum())) / (1 + permutations)
    ends = interval(value, spread(moments, estimate.gradient), confidence, n=n)
    return Score(value, ends, p_value, n, batches, estimator, confidence, permutations)


def contrast(estimate: Estimate, moments: Moments | None, *, n: int, confidence: float) -> Contrast:
    """The Contrast of the difference of two estimates of the same images.

    Both scores have one sampling error per image, so the interval is that of paired values. Its slope is zero: the variance of a
    difference rises with one score and falls with the other, and an estimate of its slope is mostly noise.
    """
    known = spread(moments, estimate.gradient)
    ends = interval(estimate.value, known and known._replace(slope=0.0), confidence, n=n, limit=2.0)
    return Contrast(estimate.value, ends)
