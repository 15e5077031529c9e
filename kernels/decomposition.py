"""Exact shares of images and positions in an inner product of distance matrices.

A score's numerator is <A,G> = sum_ij D_ij G_ij, with D the distances of one network's features and G the U-centred matrix of the other
side (U-centring is its own adjoint and leaves G unchanged, so D need not be centred). A squared distance is a sum over positions,
D_ij^2 = sum_p |F_i(p) - F_j(p)|^2. With W_ij = G_ij/D_ij, and 0 where D_ij = 0,

    <A,G> = sum_i sum_p c_i(p),     c_i(p) = sum_j W_ij |F_i(p) - F_j(p)|^2
                                            = r_i |F_i(p)|^2 - 2 F_i(p) . (W F)_i(p) + (W q)_i(p),   r = W 1,  q_j(p) = |F_j(p)|^2.

The last form costs one product [n, n] x [n, d]. It holds for features of any origin; each position's mean over the images is subtracted
first, which removes most of the rounding and changes nothing else. Pairs closer than the rounding of the last form are taken by direct
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels import geometry

_MANY = 0.01
"""The share of close pairs above which a product in float64 is quicker than one difference after another."""

ELEMENTS = 1 << 22
"""Elements of features that one step copies."""


def shares(features: Tensor, distances: Tensor, matrix: Tensor) -> Tensor:
    """c_i(p) [n, P] of features [n, C, P], their distances [n, n] and a U-centred matrix [n, n]; its sum is sum_ij D_ij G_ij.

    The result is float64. Features of half precision are computed in float32.
    """
    return context_shares(features, distances, matrix[None], [slice(0, len(features))])[0, 0]


def context_shares(features: Tensor, distances: Tensor, matrices: Tensor, contexts: Sequence[slice]) -> Tensor:
    """`shares` [contexts, m, n, P] for m matrices [m, n, n], with the sum over j restricted to the images of each context."""
    features = geometry.wide(features)
    squared = distances.square()
    norms = squared.mean(1) - squared.sum() / (2 * len(squared) ** 2)  # |x_i - mean|^2
    pairs = PairWeights.of(distances, matrices, norms, norms, features.dtype)
    features = features.to(pairs.dtype)
    n, channels, positions = features.shape
    result = distances.new_zeros(len(contexts), len(matrices), n, positions)
    step = max(1, ELEMENTS // (n * channels))
    for start in range(0, positions, step):
        part = slice(start, start + step)
        columns = features[:, :, part] - features[:, :, part].mean(0)
        q = squared_norms(columns)
        for context, share in zip(contexts, result, strict=True):
            share[:, :, part] = expanded(pairs.weights[:, :, context], columns, columns[context], q, q[context])
    add_in_contexts(result, pairs, contexts, lambda i, j: features[i] - features[j])
    return result


@dataclass(frozen=True, eq=False)
class PairWeights:
    """W = G/D for m matrices G, of l images against n, with the close pairs apart.

    weights [m, l, n], float64: zero for pairs at distance zero, and for close pairs, of which the expanded form loses too many digits.
    close: the close pairs (i, j). direct [m, pairs]: their weights. dtype: the type in which the expanded form of the others is exact
    enough.
    """

    weights: Tensor
    close: tuple[Tensor, Tensor]
    direct: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, distances: Tensor, matrices: Tensor, own_norms: Tensor, norms: Tensor, dtype: torch.dtype) -> PairWeights:
        """distances [l, n], U-centred matrices [m, l, n], squared norms [l] and [n] of the features about one centre, their type."""
        close = _close(distances, own_norms, norms, dtype)
        if dtype == torch.float32 and len(close[0]) > _MANY * distances.numel():
            dtype = torch.float64
            close = _close(distances, own_norms, norms, dtype)
        weights = geometry.pair_weights(matrices, distances)
        direct = weights[:, close[0], close[1]]
        weights[:, close[0], close[1]] = 0.0
        return cls(weights, close, direct, dtype)


def expanded(weights: Tensor, own: Tensor, others: Tensor, own_norms: Tensor, norms: Tensor) -> Tensor:
    """sum_j W_ij |F_i(p) - F_j(p)|^2 [m, l, P] in the expanded form, for l images against n others.

    weights [m, l, n], float64. own [l, C, P] and others [n, C, P]: the features, minus one centre. own_norms [l, P] and norms [n, P]: their
    `squared_norms`.
    """
    mixed = (weights.to(own.dtype).flatten(0, 1) @ others.flatten(1)).view(len(weights), *own.shape)
    return (weights.sum(2)[:, :, None] * own_norms + weights @ norms).sub_(mixed.mul_(own).sum(2), alpha=2)


def squared_norms(features: Tensor) -> Tensor:
    """|F_i(p)|^2 [n, P] in float64, of features [n, C, P]."""
    return features.square().sum(1).double()


def cross_shares(x: Tensor, y: Tensor, distances: Tensor, matrices: Tensor) -> Tensor:
    """c_i(p) [m, l, P] of l images against n others: sum_j W_ij |x_i(p) - y_j(p)|^2 with W = G/D, and 0 where D = 0.

    x [l, C, P], y [n, C, P]: features minus one centre, float32 or float64. distances [l, n]. matrices [m, l, n]: the same part of m
    U-centred matrices G. Float64; a traced graph computes in float32 and repairs no close pair, as its distances do not.
    """
    if torch.compiler.is_compiling():
        weights = geometry.pair_weights(matrices, distances)
        mixed = (weights @ y.flatten(1)).unflatten(2, y.shape[1:]) * x  # `expanded` without memory that is written in place
        traced: Tensor = weights.sum(2)[:, :, None] * x.square().sum(1) + weights @ y.square().sum(1) - 2 * mixed.sum(2)
        return traced
    own, others = squared_norms(x), squared_norms(y)
    pairs = PairWeights.of(distances.double(), matrices.double(), own.sum(1), others.sum(1), x.dtype)
    rows, columns = x.to(pairs.dtype), y.to(pairs.dtype)
    result = expanded(pairs.weights, rows, columns, own, others)
    add_directly(result, *pairs.close, pairs.direct, lambda i, j: x[i] - y[j])
    return result


def in_contexts(weights: Tensor, contexts: Sequence[slice]) -> Tensor:
    """Weights [m, n, n] as [contexts, m, n, n]: in each context, those of other images are zero."""
    result = weights.new_zeros(len(contexts), *weights.shape)
    for context, part in zip(contexts, result, strict=True):
        part[:, :, context] = weights[:, :, context]
    return result


def add_in_contexts(result: Tensor, pairs: PairWeights, contexts: Sequence[slice], difference: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`add_directly` of the close pairs to ``result`` [contexts, m, n, P], to each context those whose second image is in it."""
    rows, others = pairs.close
    member = torch.zeros(result.shape[2], dtype=torch.bool, device=result.device)
    for context, share in zip(contexts, result, strict=True):
        member[:] = False
        member[context] = True
        inside = member[others]
        add_directly(share, rows[inside], others[inside], pairs.direct[:, inside], difference)


def add_directly(result: Tensor, rows: Tensor, columns: Tensor, direct: Tensor, difference: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Add W_ij |F_i(p) - F_j(p)|^2 of the pairs (rows, columns), with weights ``direct`` [m, pairs], to ``result`` [m, l, P].

    difference: F_i - F_j [k, C, P] of k pairs.
    """
    start, step = 0, 1
    while start < len(rows):
        i, j = rows[start : start + step], columns[start : start + step]
        squared = difference(i, j).square()
        result.index_add_(1, i, direct[:, start : start + step, None] * squared.sum(1, dtype=torch.float64))
        start, step = start + step, max(1, ELEMENTS // squared[0].numel())


def _close(distances: Tensor, own_norms: Tensor, norms: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The pairs whose squared distance is not zero and is too small a share of their squared norms for the expanded form."""
    close = distances.square() < geometry.REPAIR_BELOW[dtype] * (own_norms[:, None] + norms)
    rows, columns = torch.nonzero(close & (distances > 0), as_tuple=True)
    return rows, columns


def spread(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps [..., h, w] on a grid of ``height`` x ``width``: each cell's mass is distributed by area, so that sums stay the same."""
    rows, columns = _overlap(maps.shape[-2], height, maps), _overlap(maps.shape[-1], width, maps)
    result: Tensor = rows @ maps @ columns.T
    return result


def _overlap(size: int, cells: int, like: Tensor) -> Tensor:
    """[cells, size]: the part of each of ``size`` equal intervals of [0, 1] that lies in each of ``cells`` equal intervals."""
    edges, other = (torch.arange(count + 1, dtype=like.dtype, device=like.device) / count for count in (size, cells))
    low, high = torch.maximum(edges[None, :-1], other[:-1, None]), torch.minimum(edges[None, 1:], other[1:, None])
    return (high - low).clamp_min(0) * size
