"""Permutations, confidence intervals, adjusted p-values, and exact intervals and tests for counts."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from kdx.features.target import Target
from kdx.kernels import geometry
from kdx.kernels.moments import Influences, Moments, of_batches

_FEW_IMAGES = 256
"""Up to about this many images, one pass over n x n per permutation is faster than a matrix product with the classes."""

_EDGE = 1 - 1e-12
"""Correlations are clipped to this: Fisher's z of 1 is infinite, and no float64 score is more precise than this."""

ROUNDING = 1e-12
"""A variance below this share of its terms is rounding."""

_KNOWN_SLOPE = 64
"""From this number of images on, the slope of a variance is certain enough to shorten an interval."""

MANY_BATCHES = 20
"""From this number of batches on, the variation between batches is known well enough."""


def permutation_table(n: int, permutations: int, seed: int | Sequence[int], device: torch.device | None = None) -> Tensor:
    """Random permutations [permutations, n] of n images. The same seed gives the same permutations."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)).to(device)


def permuted_target_products(matrices: Tensor, target: Target, permutations: Tensor) -> Tensor:
    """Inner products [p, k] of centred matrices [k, n, n] with the target's, under permutations [p, n] of the target's images."""
    n = len(target.values)
    if n > _FEW_IMAGES and len(permutations) and target.rows.shape[1] <= n:
        classes = target.classes
        if classes is not None and 4 * classes.count <= n:
            return geometry.permuted_class_products(matrices, target.distances.raw, classes.codes, permutations)
    return geometry.permuted_products(matrices, target.distances.centred, permutations)


def with_permuted(products: Tensor, permuted: int, rows: Tensor) -> Tensor:
    """Inner products [p, k, k] under permutations of the matrix ``permuted``, from its products ``rows`` [p, k] with all matrices."""
    result = products.expand(len(rows), *products.shape).clone()
    norm = products[permuted, permuted]
    result[:, permuted, :] = rows
    result[:, :, permuted] = rows
    result[:, permuted, permuted] = norm  # a permutation does not change a norm
    return result


class Spread(NamedTuple):
    """How a score varies over samples of images: its variance, the derivative ``slope`` of the variance by the score, and the number of
    independent parts of the images from which both are known."""

    variance: float
    slope: float
    parts: int


def pooled_moments(products: Tensor, within: Sequence[Moments | None]) -> Moments | None:
    """The moments of inner products that are summed over batches, from the products [b, k, k] and the moments of each batch.

    With fewer than `MANY_BATCHES` batches they are the sum of those ``within`` the batches, which are known from images or parts of the
    images. With more batches, or if a batch has none, they come from the variation between batches. None for one batch without moments.
    """
    known = [moments for moments in within if moments is not None]
    if len(products) < MANY_BATCHES and len(known) == len(products):
        return functools.reduce(operator.add, known)
    if len(products) < 2:
        return None
    between = of_batches(products)
    # The third moment of few batches is noise.
    return between if len(products) >= MANY_BATCHES else replace(between, slope=torch.zeros_like(between.slope))


def spread(moments: Moments | None, gradient: NDArray[np.float64]) -> Spread | None:
    """The spread of a score with this gradient [m] by the inner products of `kdx.kernels.moments.upper`; None if it is not known.

    Its variance is that of the jackknife, minus the part that the jackknife counts twice, which is at most half of it.
    """
    if moments is None or not np.isfinite(gradient).all():
        return None
    first, second, third = (values.numpy(force=True) for values in (moments.variance, moments.interaction, moments.slope))
    variance = float(gradient @ first @ gradient)
    if variance <= ROUNDING * float(np.abs(gradient) @ np.abs(first) @ np.abs(gradient)):
        return Spread(0.0, 0.0, moments.parts)
    slope = float(np.einsum("abc,a,b,c", third, gradient, gradient, gradient)) / variance
    variance -= min(float(gradient @ second @ gradient), variance / 2)
    return Spread(variance, slope, moments.parts) if np.isfinite([variance, slope]).all() else None


@dataclass(frozen=True, eq=False)
class ScoreMoments:
    """The moments of c scores, as those of inner products in `kdx.kernels.moments`; those of sums over independent batches are added.

    parts: the number of parts of the images. variance, interaction, slope [c]: as in `Moments`. magnitude [c]: the sum of the absolute
    terms of the variance, beside which it can be rounding.
    """

    parts: int
    variance: Tensor
    interaction: Tensor
    slope: Tensor
    magnitude: Tensor

    @classmethod
    def of(cls, influences: Influences, gradients: Tensor) -> ScoreMoments:
        """From influences on [c, m] inner products, m for each score, and the gradients [c, m] of the scores by them."""
        parts = influences.parts
        scale = parts * (parts - 1)
        first = torch.einsum("cm,cmu->cu", gradients, influences.first)
        terms = torch.einsum("cm,cmu->cu", gradients.abs(), influences.first.abs())
        variance, slope = first.square().sum(1) / scale, first.pow(3).sum(1)
        interaction = torch.zeros_like(variance)
        if influences.second is not None:
            second = torch.einsum("cm,cmuv->cuv", gradients, influences.second)
            slope = slope + 2 * torch.einsum("cu,cuv,cv->c", first, second, first)
            interaction = second.square().sum((1, 2)) / (2 * scale)
        return cls(parts, variance, interaction, slope / (parts * scale), terms.square().sum(1) / scale)

    def __add__(self, other: ScoreMoments) -> ScoreMoments:
        return ScoreMoments(
            self.parts + other.parts,
            self.variance + other.variance,
            self.interaction + other.interaction,
            self.slope + other.slope,
            self.magnitude + other.magnitude,
        )

    def without_slope(self) -> ScoreMoments:
        """With a slope of zero, for few batches, whose third moment is noise."""
        return replace(self, slope=torch.zeros_like(self.slope))

    def spreads(self) -> list[Spread | None]:
        """`spread` of each score."""
        nothing = self.variance <= ROUNDING * self.magnitude
        reduced = self.variance - torch.minimum(self.interaction, self.variance / 2)
        slopes = self.slope / self.variance
        known = reduced.isfinite() & slopes.isfinite()
        rows = zip(nothing.tolist(), known.tolist(), reduced.tolist(), slopes.tolist(), strict=True)
        return [
            Spread(0.0, 0.0, self.parts) if zero else Spread(variance, slope, self.parts) if ok else None
            for zero, ok, variance, slope in rows
        ]


def spreads(influences: Influences | None, gradients: Tensor) -> list[Spread | None]:
    """`spread` of c scores of their own inner products, with influences on [c, m] products and gradients [c, m]."""
    return [None] * len(gradients) if influences is None else ScoreMoments.of(influences, gradients).spreads()


def difference_test(value: float, spread: Spread | None, *, limit: float = 2.0) -> float | None:
    """The two-sided p-value of the value zero, by Student's t on the scale of `interval` without a slope; None if it is not known.

    It is below 1 - confidence exactly where the interval without a slope excludes zero.
    """
    if spread is None or spread.variance <= 0:
        return None
    share = float(np.clip(value / limit, -_EDGE, _EDGE))
    error = float(np.sqrt(spread.variance)) / (limit * (1 - share * share))
    return float(2 * special.stdtr(spread.parts - 1, -abs(np.arctanh(share)) / error))


def interval(value: float, spread: Spread | None, confidence: float, *, n: int, limit: float = 1.0) -> tuple[float, float]:
    """The confidence interval of a value in [-limit, limit], a score or a difference of two scores of n images.

    With z = artanh(value/limit), Fisher's scale, on which s is the standard error and v the slope of the variance, and with the quantile q
    of Student's t distribution with parts - 1 degrees of freedom, the interval is z +/- q s + q^2 v/4. It never leaves the range of the
    value. It is the interval of a value whose variance changes linearly with it; the square root of the variance is then on a scale where
    the variance is constant. A side is shortened by this at most by a quarter, and not at all for fewer than 64 images, whose slope is
    too uncertain. Without a spread it is the whole range.
    """
    if spread is None:
        return -limit, limit
    share = float(np.clip(value / limit, -_EDGE, _EDGE))
    scale = limit * (1 - share * share)
    quantile = t_quantile(confidence, spread.parts)
    reach = quantile * float(np.sqrt(spread.variance)) / scale
    shift = quantile * quantile * spread.slope / (4 * scale)
    shortest = reach if n < _KNOWN_SLOPE else 0.75 * reach
    centre = float(np.arctanh(share))
    below, above = max(reach - shift, shortest), max(reach + shift, shortest)
    return limit * float(np.tanh(centre - below)), limit * float(np.tanh(centre + above))


@functools.lru_cache(maxsize=64)
def t_quantile(confidence: float, parts: int) -> float:
    """The quantile of Student's t distribution with parts - 1 degrees of freedom for a two-sided interval."""
    return float(stats.t.ppf(0.5 + confidence / 2, parts - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number m by Holm's method, in their order: rejecting those up to alpha errs anywhere with at most alpha.

    The i-th smallest p becomes max over j <= i of (m - j + 1) p_(j), at most 1. It holds for p-values that depend on each other in any
    way. Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p_values, kind="stable")
    sorted_values = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(sorted_values), 1)
    return [float(p) for p in adjusted]


def wilson(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a share of ``hits`` among n images."""
    interval = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy(right: NDArray[np.bool_], confidence: float) -> dict[str, Any]:
    """The share of correctly predicted images, with Wilson's interval."""
    return {
        "value": float(right.mean()),
        "interval": [*wilson(int(right.sum()), len(right), confidence)],
        "correct": int(right.sum()),
        "n": len(right),
    }


def sign_test(a: int, b: int) -> float:
    """The exact two-sided p-value of the sign test (McNemar's exact test) for a against b discordant images; 1 if there are none."""
    n = a + b
    tail: int = 2 * sum(math.comb(n, k) for k in range(min(a, b) + 1))
    whole: int = 2**n
    return min(1.0, tail / whole)
