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

import torch
from torch import Tensor

from kdx.kernels import geometry

_MANY = 0.01
"""The share of close pairs above which a product in float64 is quicker than one difference after another."""

_ELEMENTS = 1 << 22
"""Elements of features that one step copies."""


def shares(features: Tensor, distances: Tensor, matrix: Tensor) -> Tensor:
    """c_i(p) [n, P] of features [n, C, P], their distances [n, n] and a U-centred matrix [n, n]; its sum is sum_ij D_ij G_ij.

    The result is float64. Features of half precision are computed in float32.
    """
    features = geometry.wide(features)
    near = _near(distances, geometry.REPAIR_BELOW[features.dtype])
    if features.dtype == torch.float32 and len(near[0]) > _MANY * distances.numel():
        features = features.double()
        near = _near(distances, geometry.REPAIR_BELOW[features.dtype])
    apart = distances > 0
    pair_weights = torch.where(apart, matrix / torch.where(apart, distances, 1.0), 0.0)
    direct = pair_weights[near]
    pair_weights[near] = 0.0
    n, channels, positions = features.shape
    result = distances.new_zeros(n, positions)
    weights, rows = pair_weights.to(features.dtype), pair_weights.sum(1)
    step = max(1, _ELEMENTS // (n * channels))
    for start in range(0, positions, step):
        part = slice(start, start + step)
        columns = features[:, :, part] - features[:, :, part].mean(0)
        mixed = (weights @ columns.flatten(1)).reshape(columns.shape)
        cross = mixed.mul_(columns).sum(1).double()
        norms = columns.square_().sum(1).double()
        result[:, part] = rows[:, None] * norms - 2 * cross + pair_weights @ norms
    _add_directly(result, features, near, direct)
    return result


def _near(distances: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) whose squared distance is not zero and below ``share`` of the sum of their squared norms about the mean.

    The norms follow from the distances: |x_i - mean|^2 = sum_j D_ij^2 / n - sum_ij D_ij^2 / (2 n^2).
    """
    squared = distances.square()
    n = len(squared)
    norms = squared.mean(1) - squared.sum() / (2 * n**2)
    close = squared < share * (norms[:, None] + norms[None, :])
    rows, columns = torch.nonzero(close & (distances > 0), as_tuple=True)
    return rows, columns


def _add_directly(result: Tensor, features: Tensor, pairs: tuple[Tensor, Tensor], weights: Tensor) -> None:
    """Add W_ij |F_i(p) - F_j(p)|^2 of the pairs (i, j) to the rows i of ``result`` [n, P]."""
    step = max(1, _ELEMENTS // features[0].numel())
    for start in range(0, len(weights), step):
        i, j = (index[start : start + step] for index in pairs)
        squared = (features[i] - features[j]).square().sum(1, dtype=torch.float64)
        result.index_add_(0, i, weights[start : start + step, None] * squared)


def spread(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps [n, h, w] on a grid of ``height`` x ``width``: each cell's mass is distributed by area, so that sums stay the same."""
    rows, columns = _overlap(maps.shape[1], height, maps), _overlap(maps.shape[2], width, maps)
    result: Tensor = rows @ maps @ columns.T
    return result


def _overlap(size: int, cells: int, like: Tensor) -> Tensor:
    """[cells, size]: the part of each of ``size`` equal intervals of [0, 1] that lies in each of ``cells`` equal intervals."""
    edges, other = (torch.arange(count + 1, dtype=like.dtype, device=like.device) / count for count in (size, cells))
    low, high = torch.maximum(edges[None, :-1], other[:-1, None]), torch.minimum(edges[None, 1:], other[1:, None])
    return (high - low).clamp_min(0) * size
