"""Similarities of many layers, with intervals, from sums over images: correlations of k matrices without moments of all their products.

The moments of the k(k+1)/2 inner products of k matrices are a table of that size squared. Here the influence of each part of the images is
computed for the inner products that are needed, and combined into the influence on each score, so that s scores need memory for s u^2
numbers with u parts. The result is that of `kdx.scores.uncertainty.spread`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.kernels import moments
from kdx.kernels.layer_sums import LayerSums
from kdx.kernels.moments import Influences
from kdx.scores.uncertainty import MANY_BATCHES, ScoreMoments, Spread, interval

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
    for number, place in enumerate(np.ndindex(estimates.shape)):
        value = float(estimates[place])
        ends = interval(value, None if spreads is None else spreads[number], confidence, n=sums.n)
        low[place], high[place] = min(ends[0], value), max(ends[1], value)
    return Correlations(estimates, low, high)


def _spreads(
    sums: PooledSums, weights: Tensor, products: Tensor, values: Tensor, first: Sequence[int], second: Sequence[int]
) -> list[Spread | None] | None:
    """The spread of each correlation [a, b], row by row; None if there is nothing to know it from."""
    shape = values.shape
    rows = torch.tensor(first, device=values.device)[:, None].expand(shape).flatten()
    columns = torch.tensor(second, device=values.device)[None].expand(shape).flatten()
    # A correlation is a function of three inner products, of which many are those of other correlations too.
    needed, place = torch.stack([torch.cat([rows, rows, columns]), torch.cat([columns, rows, columns])]).unique(dim=1, return_inverse=True)
    place = place.view(3, -1).T
    r, norms = values.flatten(), products.diagonal()
    gradients = torch.stack([(norms[rows] * norms[columns]).rsqrt(), -r / (2 * norms[rows]), -r / (2 * norms[columns])], 1)
    if sums.blocks:
        blocks = (_block_influences(block, weights, needed) for block in sums.blocks)
        return functools.reduce(operator.add, (_score_moments(block, place, gradients) for block in blocks)).spreads()
    if len(sums.distances) < 2:
        return None
    inner = (weights @ sums.distances @ weights.T)[:, needed[0], needed[1]].T
    between = _score_moments(Influences(len(sums.distances) * (inner - inner.mean(1, keepdim=True)), None), place, gradients)
    return (between if len(sums.distances) >= MANY_BATCHES else between.without_slope()).spreads()


def _block_influences(block: LayerSums, weights: Tensor, needed: Tensor) -> Influences:
    """The influences on the needed inner products of one batch."""
    sums = block.distances
    pairs = torch.einsum("ab,bcuv,dc->aduv", weights, sums.pairs, weights)
    rows = (weights @ sums.rows.flatten(1)).view_as(sums.rows)
    return moments.influences(pairs, rows, sums.division.sizes, which=(needed[0], needed[1]))


def _score_moments(influences: Influences, place: Tensor, gradients: Tensor) -> ScoreMoments:
    """The moments of s scores of the inner products with the numbers ``place`` [s, 3]."""
    second = None if influences.second is None else influences.second[place]
    return ScoreMoments.of(Influences(influences.first[place], second), gradients)
