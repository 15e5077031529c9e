"""The products of images at every position: one pass over the features gives their distances and the shares of any number of scores.

With K_p,ij = <F_i(p), F_j(p)> of features minus their mean over the images, and q_i(p) = K_p,ii,

    D_ij^2 = sum_p (q_i(p) + q_j(p) - 2 K_p,ij),      c_i(p) = r_i q_i(p) + (W q)_i(p) - 2 sum_j W_ij K_p,ij,    r = W 1

(`kdx.kernels.decomposition` derives c). The products of all positions take as many operations as the one Gram product of whole images,
which is their sum. A share then costs n^2 P operations instead of the n^2 C P of the product W F. The products take n/C of the memory of
the features; where that is more than the features themselves, distances and shares are computed without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdx.kernels import geometry
from kdx.kernels.decomposition import PairWeights, add_in_contexts, context_shares, in_contexts
from kdx.kernels.distances import distances_of_gram, ordinary, parts_per_step, power_of_two


class PositionGeometry(Protocol):
    """The geometry of n images with P positions."""

    @property
    def distances(self) -> Tensor:
        """Between the images: float64 [n, n]."""
        ...

    def shares(self, matrices: Tensor, contexts: Sequence[slice]) -> Tensor:
        """`decomposition.context_shares` [contexts, m, n, P] with U-centred matrices [m, n, n], in float64."""
        ...


@dataclass(frozen=True, eq=False)
class PositionProducts:
    """`PositionGeometry` of features [n, C, P] in PyTorch. products: K [P, n, n], or None where they would be larger than the features."""

    features: Tensor
    products: Tensor | None
    distances: Tensor

    @classmethod
    def of(cls, features: Tensor) -> PositionProducts:
        n, channels, _ = features.shape
        if n > channels:
            return cls(features, None, geometry.distances(features.flatten(1)))
        rows = geometry.wide(features)
        mean = rows.mean(0)
        products = _products(rows, mean)
        return cls(features, products, distances_of_gram(products.sum(0), rows.flatten(1), mean.flatten()[None]))

    def shares(self, matrices: Tensor, contexts: Sequence[slice]) -> Tensor:
        if self.products is None:
            return context_shares(self.features, self.distances, matrices, contexts)
        products = self.products
        norms = products.diagonal(dim1=1, dim2=2).double()  # [P, n]
        total = norms.sum(0)
        pairs = PairWeights.of(self.distances, matrices, total, total, products.dtype)
        if pairs.dtype != products.dtype:  # most pairs are close
            return context_shares(self.features, self.distances, matrices, contexts)
        n = len(total)
        rows = in_contexts(pairs.weights, contexts).flatten(0, 1)
        # For each image i, [contexts m, n] x [n, P].
        mixed = torch.bmm(rows.to(products.dtype).transpose(0, 1), products.permute(1, 2, 0)).transpose(0, 1)
        result = rows.sum(2)[:, :, None] * norms.T + rows @ norms.T - 2 * mixed.double()
        result = result.view(len(contexts), len(matrices), n, -1)
        wide = geometry.wide(self.features)
        add_in_contexts(result, pairs, contexts, lambda i, j: wide[i] - wide[j])
        return result


@dataclass(frozen=True, eq=False)
class _Rescaled:
    """`PositionGeometry` of features from that of the same features times a power of two."""

    multiplied: PositionGeometry
    factor: float

    @property
    def distances(self) -> Tensor:
        return self.multiplied.distances / self.factor

    def shares(self, matrices: Tensor, contexts: Sequence[slice]) -> Tensor:
        return self.multiplied.shares(matrices, contexts) / self.factor


def positions_of_any_magnitude(measure: Callable[[Tensor], PositionGeometry], features: Tensor) -> PositionGeometry:
    """measure(features), or that of the features times a power of two: see `kdx.kernels.distances.of_any_magnitude`."""
    positions = measure(features)
    dtype = torch.promote_types(features.dtype, torch.float32)
    if ordinary(positions.distances, dtype):
        return positions
    factor = power_of_two(float(torch.linalg.vector_norm(features, torch.inf)), dtype)
    return _Rescaled(measure(geometry.wide(features) * factor), factor)


def _products(features: Tensor, mean: Tensor) -> Tensor:
    """K [P, n, n] of features [n, C, P] minus their mean [C, P], some channels at a time.

    Each step adds to all products, so it has n channels at least, which take as much memory as the products.
    """
    n, channels, positions = features.shape
    step = min(channels, max(n, parts_per_step(channels, features.nbytes, features.device)))
    products = features.new_zeros(positions, n, n)
    buffer = features.new_empty(n * positions * step)
    for part, centre in zip(features.split(step, 1), mean.split(step), strict=True):
        centred = torch.sub(part.mT, centre.T, out=buffer[: part.numel()].view(n, positions, -1)).transpose(0, 1)
        products.baddbmm_(centred, centred.mT)
    return products
