"""Inputs of the kernels' tests, and their results by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from kdx.kernels import geometry, reference
from tests import oracle

EXACT = oracle.TOLERANCE["float64"]
SINGLE = 1e-6
"""Float32 results of sums that are exact to about a hundred times their rounding."""


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Float32 rows [n, d] minus their mean. Rows 1 and 2 are equal, and the last row is close to row 0."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[2] = x[1]
    x[-1] = x[0] + 1e-4 * torch.randn(d, generator=torch.Generator().manual_seed(seed + 1))
    return x - x.mean(0)


def matrices(batches: int, count: int, n: int) -> Tensor:
    """Distances [batches, count, n, n] in float64 that float32 represents exactly, between related features."""
    x = torch.randn(batches, 1, n, 6, generator=torch.Generator().manual_seed(n))
    y = torch.randn(batches, count, n, 6, generator=torch.Generator().manual_seed(count))
    return geometry.distances(x + y).float().double()


def geometries(n: int, count: int = 1, classes: int = 2, channels: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float32 distances [count, n, n] of two networks' features and of a target, and float64 means [count, n, channels]."""
    batches: list[tuple[Tensor, ...]] = []
    for seed in range(count):
        x, y, labels = oracle.features(seed, n, shape=(channels, 3, 1), classes=classes)
        features = (x.flatten(1), y.flatten(1), torch.nn.functional.one_hot(labels).double())
        batches.append((*(geometry.distances(f).float() for f in features), geometry.gap(x)))
    d, given, target, means = (torch.stack(part) for part in zip(*batches, strict=True))
    return d, given, target, means


def laplacian(d: Tensor, given: Tensor, target: Tensor, objective: str) -> geometry.Laplacian:
    """`geometry.laplacian` of distances, in float64."""
    a, b, g = (geometry.u_centered(matrix.double()) for matrix in (d, given, target))
    return geometry.laplacian(d.double(), a, b, g, geometry.OBJECTIVES[objective])


def gradients(lap: Tensor, means: Tensor) -> Tensor:
    """`geometry.gradient` of a stack."""
    return torch.stack([geometry.gradient(*pair) for pair in zip(lap, means, strict=True)])


def among(m: int, q: int, channels: int = 11) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor]:
    """`geometries` as distances inside m references and from q queries to them, the means of the queries and of the references."""
    *distances, means = (part[0] for part in geometries(m + q, channels=channels))
    return tuple(d[:m, :m] for d in distances), tuple(d[m:, :m] for d in distances), means[m:], means[:m]


def defined(d: Tensor) -> Tensor:
    """The inner products [batches, count, count] of distances by definition."""
    centred = [[reference.u_centered(matrix) for matrix in batch] for batch in d.double()]
    return torch.stack([torch.stack([torch.stack([reference.inner(a, b) for b in batch]) for a in batch]) for batch in centred])
