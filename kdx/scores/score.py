"""A score with its interval and p-value, and the statistics that make one from inner products."""

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
    """A similarity or relevance score.

    value: in [-1, 1]; 0 is expected of unrelated features (unbiased estimator), 1 is the same geometry.
    interval: jackknife confidence interval of ``value``, on Fisher's z scale; NaN-free: (-1, 1) where too little is known.
    p_value: one-sided, the share of permutations of the images that score at least as high; None without permutations.
    n: images. batches: how many sets their geometry was measured in.

    A score compares geometries, image pair by image pair. It does not say that one network caused the other's.
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
    """The difference of two scores of the same images, in [-2, 2], with its jackknife confidence interval.

    An interval that excludes zero says that the two scores differ; (-2, 2) means that too little is known.
    """

    value: float
    interval: tuple[float, float]


def correlation(products: Tensor) -> Tensor:
    """<X,Y>/sqrt(<X,X><Y,Y>) from inner products [..., 2, 2] of (X, Y)."""
    return products[..., 0, 1] / (products[..., 0, 0] * products[..., 1, 1]).sqrt()


def semipartial(products: Tensor) -> Tensor:
    """<R,G>/sqrt(<R,R><G,G>), R = X - (<X,Y>/<Y,Y>) Y, from inner products [..., 3, 3] of (X, G, Y)."""
    left = _projected(products)
    return left[..., 0, 1] / (left[..., 0, 0] * products[..., 1, 1]).sqrt()


def partial(products: Tensor) -> Tensor:
    """As `semipartial`, with Y projected out of G too (Szekely and Rizzo 2014)."""
    return correlation(_projected(products))


def _projected(products: Tensor) -> Tensor:
    """Inner products of X and G without their Y-components."""
    xy = products[..., :2, 2]
    return products[..., :2, :2] - xy[..., :, None] * xy[..., None, :] / products[..., 2:, 2:]


STATISTICS: dict[StatisticName, Statistic] = {"correlation": correlation, "semipartial": semipartial}
"""The statistics of the scores of roles, by the names in `kdx.roles`."""


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
    """A Score from its value [], its jackknife replicates [units] and its permuted values [p]."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if not np.isfinite(value):
        raise ValueError("the score is not a number")  # what can make it so is refused before
    permutations = 0 if permuted is None else len(permuted)
    p_value = None
    if permuted is not None and permutations:
        # Equal to rounding counts as at least as high, so that a tie never makes a result significant.
        p_value = (1 + int((permuted >= value - 1e-12).sum())) / (1 + permutations)
    return Score(
        float(value), jackknife_interval(float(value), left_out, confidence), p_value, n, batches, estimator, confidence, permutations
    )
