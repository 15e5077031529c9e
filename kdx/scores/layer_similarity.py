"""Similarities of many layers, with intervals, from sums over images: correlations of k matrices without moments of all their products.

The moments of the k(k+1)/2 inner products of k matrices are a table of that size squared. Here the influence of each part of the images is
computed for the inner products that are needed, and combined into the influence on each score, so that s scores need memory for s u^2
numbers with u parts. The result is that of `kdx.scores.uncertainty.spread`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.kernels import moments
from kdx.kernels.layer_sums import LayerSums
from kdx.kernels.moments import Influences
from kdx.scores.uncertainty import MANY_BATCHES, ROUNDING, Spread, interval

_FEWEST = 5
"""An interval needs inner products without single images, and those need at least four other images."""

_SPANNED = 1e-13
"""The share of a squared norm below which a difference of inner products is rounding."""


@dataclass(frozen=True, eq=False)
class PooledSums:
    """The sums of k layers over one set or several batches: inner products [b, k, k] of distances and of linear kernels, and the sums.

    blocks: the sums of each batch, by parts of its images; () where there are so many batches that the variation between them is known.
    n: the number of images. floor [k]: the squared norms of centred matrices that are only rounding.
    """

    n: int
    floor: Tensor
    distances: Tensor
    kernels: Tensor
    blocks: tuple[LayerSums, ...]

    @property
    def constant(self) -> list[int]:
        """The numbers of the layers whose images are all equally far from each other, up to rounding."""
        norms = self.distances.sum(0).diagonal()
        return [int(number) for number in torch.nonzero(~(norms > self.floor)).flatten()]

    @classmethod
    def of(cls, blocks: Sequence[LayerSums], floor: Tensor) -> PooledSums:
        """The sums of one or more batches."""
        few = len(blocks) < MANY_BATCHES and all(block.distances.rows.shape[1] >= _FEWEST for block in blocks)
        return cls(
            sum(block.distances.rows.shape[1] for block in blocks),
            floor,
            torch.stack([block.distances.products() for block in blocks]),
            torch.stack([block.squares.products() for block in blocks]),
            tuple(blocks) if few else (),
        )


@dataclass(frozen=True, eq=False)
class Correlations:
    """Correlations [a, b] of the layers of two networks, and the ends of their intervals."""

    values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def correlations(products: Tensor, first: Sequence[int], second: Sequence[int]) -> Tensor:
    """<X,Y>/sqrt(<X,X><Y,Y>) [a, b] of the matrices ``first`` [a] and ``second`` [b], in [-1, 1], from all inner products [k, k].

    It is 0 where a norm is 0.
    """
    norms = products.diagonal().sqrt()
    values = products[list(first)][:, list(second)] / (norms[list(first), None] * norms[list(second)])
    return values.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)


def distance_correlations(sums: PooledSums, first: Sequence[int], second: Sequence[int], confidence: float) -> Correlations:
    """The distance correlations of the layers ``first`` [a] with the layers ``second`` [b]."""
    k = sums.distances.shape[1]
    return _with_intervals(sums, torch.eye(k, dtype=torch.float64, device=sums.distances.device), first, second, confidence)


def partial_correlations(
    sums: PooledSums, first: Sequence[int], second: Sequence[int], given: Sequence[int], confidence: float
) -> Correlations:
    """The correlations of the residuals of ``first`` [a] and ``second`` [b] after all layers ``given`` are projected out of both.

    Where nothing is left of a layer, the value is 0 and the interval is the whole range.
    """
    products = sums.distances.sum(0)
    weights = torch.eye(len(products), dtype=torch.float64, device=products.device)
    scale = products.diagonal()[list(given)].rsqrt()
    inner = products[list(given)][:, list(given)] * scale[:, None] * scale
    inverse = scale[:, None] * torch.linalg.pinv(inner, rtol=1e-10, hermitian=True) * scale
    weights[:, list(given)] -= products[:, list(given)] @ inverse  # rows of the given layers are not used
    left = (weights @ products @ weights.T).diagonal()
    spanned = left <= torch.maximum(sums.floor, _SPANNED * products.diagonal())
    result = _with_intervals(sums, weights, first, second, confidence)
    rows, columns = spanned[list(first)].numpy(force=True), spanned[list(second)].numpy(force=True)
    empty = rows[:, None] | columns
    return Correlations(np.where(empty, 0.0, result.values), np.where(empty, -1.0, result.low), np.where(empty, 1.0, result.high))


def _with_intervals(sums: PooledSums, weights: Tensor, first: Sequence[int], second: Sequence[int], confidence: float) -> Correlations:
    """The correlations of the combinations ``weights`` [k, k] of the matrices, with intervals.

    The weights count as fixed. That is exact to first order for residuals: they are orthogonal to what is projected out, so the derivative
    of their inner products by the weights is zero.
    """
    products = weights @ sums.distances.sum(0) @ weights.T
    values = correlations(products, first, second)
    spreads = _spreads(sums, weights, products, values, first, second)
    estimates = values.numpy(force=True)
    low, high = np.empty_like(estimates), np.empty_like(estimates)
    for place in np.ndindex(estimates.shape):
        value = float(estimates[place])
        ends = interval(value, None if spreads is None else spreads.at(place), confidence, n=sums.n)
        low[place], high[place] = min(ends[0], value), max(ends[1], value)
    return Correlations(estimates, low, high)


@dataclass(frozen=True, eq=False)
class _Spreads:
    """The variances and slopes [a, b] of scores, and the number of parts from which they are known."""

    variance: NDArray[np.float64]
    slope: NDArray[np.float64]
    parts: int

    def at(self, place: tuple[int, ...]) -> Spread | None:
        variance, slope = float(self.variance[place]), float(self.slope[place])
        return Spread(variance, slope, self.parts) if np.isfinite([variance, slope]).all() else None


def _spreads(
    sums: PooledSums, weights: Tensor, products: Tensor, values: Tensor, first: Sequence[int], second: Sequence[int]
) -> _Spreads | None:
    """The spread of each correlation; None if there is nothing to know it from."""
    shape = values.shape
    rows = torch.tensor(first, device=values.device)[:, None].expand(shape).flatten()
    columns = torch.tensor(second, device=values.device)[None].expand(shape).flatten()
    needed, place = torch.stack([torch.cat([rows, rows, columns]), torch.cat([columns, rows, columns])]).unique(dim=1, return_inverse=True)
    r, norms = values.flatten(), products.diagonal()
    scales = torch.stack([(norms[rows] * norms[columns]).rsqrt(), -r / (2 * norms[rows]), -r / (2 * norms[columns])])
    total = _Moments.zero(len(r), values.device)
    if sums.blocks:
        for block in sums.blocks:
            total += _of_block(block, weights, needed, place.view(3, -1), scales)
    elif len(sums.distances) > 1:
        combined = weights @ sums.distances @ weights.T
        inner = combined[:, needed[0], needed[1]].T
        influences = Influences(len(combined) * (inner - inner.mean(1, keepdim=True)), None)
        total += _Moments.of(influences, place.view(3, -1), scales)
    else:
        return None
    known = total.variance > ROUNDING * total.magnitude
    slope = torch.where(known, total.slope / total.variance, 0.0)
    if not sums.blocks and len(sums.distances) < MANY_BATCHES:
        slope = torch.zeros_like(slope)  # the third moment of few batches is noise
    variance = torch.where(known, total.variance - torch.minimum(total.interaction, total.variance / 2), 0.0)
    return _Spreads(variance.view(shape).numpy(force=True), slope.view(shape).numpy(force=True), total.parts)


def _of_block(block: LayerSums, weights: Tensor, needed: Tensor, place: Tensor, scales: Tensor) -> _Moments:
    """The moments of the scores from the sums of one batch."""
    sums = block.distances
    pairs = torch.einsum("ab,bcuv,dc->aduv", weights, sums.pairs, weights)
    rows = (weights @ sums.rows.flatten(1)).view_as(sums.rows)
    return _Moments.of(moments.influences(pairs, rows, sums.sizes, which=(needed[0], needed[1])), place, scales)


@dataclass(frozen=True, eq=False)
class _Moments:
    """The moments of s scores, as those of inner products in `kdx.kernels.moments`, and the ``magnitude`` of the variance's terms."""

    parts: int
    variance: Tensor
    interaction: Tensor
    slope: Tensor
    magnitude: Tensor

    @classmethod
    def zero(cls, scores: int, device: torch.device) -> _Moments:
        return cls(0, *torch.zeros(4, scores, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, influences: Influences, place: Tensor, scales: Tensor) -> _Moments:
        """From the influences on m inner products. A score is a combination of three of them, the numbers ``place`` [3, s], with the
        factors ``scales`` [3, s]."""
        parts, interactions = influences.parts, influences.second
        count = parts * (parts - 1)
        terms = influences.first[place] * scales[:, :, None]
        score = terms.sum(0)
        variance, slope = score.square().sum(1) / count, score.pow(3).sum(1)
        interaction = torch.zeros_like(variance)
        if interactions is not None:
            second = sum(interactions[index] * scale[:, None, None] for index, scale in zip(place, scales, strict=True))
            assert isinstance(second, Tensor)
            interaction = second.square().sum((1, 2)) / (2 * count)
            slope = slope + 2 * (score[:, None] @ second @ score[:, :, None])[:, 0, 0]
        return cls(parts, variance, interaction, slope / (parts * count), terms.abs().sum(0).square().sum(1) / count)

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.parts + other.parts,
            self.variance + other.variance,
            self.interaction + other.interaction,
            self.slope + other.slope,
            self.magnitude + other.magnitude,
        )
