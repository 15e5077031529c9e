"""Scores and contrasts with their intervals, and the statistics that compute scores from inner products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdx.roles import StatisticName
from kdx.scores.uncertainty import jackknife_interval

Estimator = Literal["unbiased", "biased"]

Statistic = Callable[[Tensor], Tensor]
"""Inner products [..., k, k] -> values [...]."""


@dataclass(frozen=True)
class Score:
    """A similarity or relevance score with its uncertainty.

    value: in [-1, 1]. With the unbiased estimator, 0 is expected for unrelated features, and 1 means the same geometry.
    interval: the jackknife confidence interval of ``value``, computed on Fisher's z scale; never NaN: (-1, 1) if too little is known.
    p_value: one-sided: the share of permutations of the images, the observed order included, that score at least as high; None without
    permutations.
    n: the number of images. batches: the number of sets in which distances were measured. estimator, confidence, permutations: the
    settings of the call.

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

    def __float__(self) -> float:
        return self.value


class Contrast(NamedTuple):
    """The difference of two scores of the same images, with its uncertainty.

    value: in [-2, 2]. interval: the jackknife confidence interval of ``value``; (-2, 2) if too little is known.
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


def summary(
    value: NDArray[np.float64],
    left_out: NDArray[np.float64],
    permuted: NDArray[np.float64] | None,
    *,
    n: int,
    batches: int,
    estimator: Estimator = "unbiased",
    confidence: float = 0.95,
) -> Score:
    """The Score of a value [], its jackknife replicates [units] and its values under permutations [p]."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if not np.isfinite(value):
        raise ValueError("the score is not a number")  # all known causes are refused earlier
    permutations = 0 if permuted is None else len(permuted)
    p_value = None
    if permuted is not None and permutations:
        # A value that is equal up to rounding counts as at least as high, so a tie never makes a result significant.
        p_value = (1 + int((permuted >= value - 1e-12).sum())) / (1 + permutations)
    return Score(
        float(value), jackknife_interval(float(value), left_out, confidence), p_value, n, batches, estimator, confidence, permutations
    )
