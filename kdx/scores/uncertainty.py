"""Permutations, jackknife intervals, and exact intervals and tests for counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from kdx.features.target import Target
from kdx.kernels import geometry

_FEW_IMAGES = 256
"""Up to about this many images, one pass over n x n per permutation is faster than a matrix product with the classes."""

_EDGE = 1 - 1e-12
"""Correlations are clipped to this: Fisher's z of 1 is infinite, and no float64 score is more precise than this."""


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


def jackknife_interval(value: float, left_out: NDArray[np.float64], confidence: float, *, fisher: bool = True) -> tuple[float, float]:
    """value +/- t_{u-1} * sqrt((u-1)/u * sum (theta_i - mean)^2), from the values theta [u] without each of u units.

    It is computed on Fisher's z scale, so that it stays inside [-1, 1]; not so if ``fisher`` is False, for a difference of scores. With
    fewer than two units it is the whole range.
    """
    units = len(left_out)
    if units < 2 or not np.isfinite(left_out).all():
        return (-1.0, 1.0) if fisher else (-2.0, 2.0)
    replicates = np.arctanh(np.clip(left_out, -_EDGE, _EDGE)) if fisher else left_out
    error = np.sqrt((units - 1) / units * np.square(replicates - replicates.mean()).sum())
    reach = float(stats.t.ppf(0.5 + confidence / 2, units - 1) * error)
    if not fisher:
        return value - reach, value + reach
    centre = np.arctanh(np.clip(value, -_EDGE, _EDGE))
    return float(np.tanh(centre - reach)), float(np.tanh(centre + reach))


def accuracy(right: NDArray[np.bool_], confidence: float) -> dict[str, Any]:
    """The share of correctly predicted images, with Wilson's interval."""
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(confidence, method="wilson")
    return {
        "value": float(right.mean()),
        "interval": [float(interval.low), float(interval.high)],
        "correct": int(right.sum()),
        "n": len(right),
    }


def sign_test(a: int, b: int) -> float:
    """The exact two-sided p-value of the sign test (McNemar's exact test) for a against b discordant images; 1 if there are none."""
    n = a + b
    tail: int = 2 * sum(math.comb(n, k) for k in range(min(a, b) + 1))
    whole: int = 2**n
    return min(1.0, tail / whole)
