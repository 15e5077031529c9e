"""Centred matrices, inner products under permutations, and influences of images, by kernels. All numbers are float64, as in
`kdx.kernels.fused`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdx.kernels import moments
from kdx.kernels.fused import Products
from kdx.kernels.launches import THREADS, check, full_grid, launch, warps
from kdx.kernels.moments import Influences

_MATRICES = 4
"""Matrices per block of the kernels of permutations."""

_LABEL_PERMUTATIONS = 2
"""Permutations per warp of the kernel of permuted labels."""


def u_centered(d: Tensor, sums: Products) -> Tensor:
    """`geometry.u_centered` of distances d [K, n, n], from ``fused.products(d[None])``."""
    count, n, _ = d.shape
    check(d.dtype == torch.float64 and sums.row_sums.shape == (1, count, n), "d must be float64 [K, n, n], with the products of d[None]")
    centred = torch.empty_like(d, memory_format=torch.contiguous_format)
    launch(d, "products", "products_centred", (count, n, 1), d.contiguous(), sums.row_sums, sums.totals, n, centred)
    return centred


def permuted_products(matrices: Tensor, permuted: Tensor, permutations: Tensor) -> Tensor:
    """`geometry.permuted_products` [p, k] of symmetric centred matrices [k, n, n] and [n, n], under permutations [p, n]."""
    n = matrices.shape[1]
    check(permuted.dtype == torch.float64 and permuted.shape == (n, n), "permuted must be float64 [n, n]")
    return _permuted("permuted_products", matrices, permuted, permutations, 1, 1.0)


def permuted_label_products(matrices: Tensor, labels: Tensor, permutations: Tensor) -> Tensor:
    """`permuted_products` [p, k] with the target matrix of int64 labels [n], of U-centred matrices [k, n, n] with n <= 256."""
    n = matrices.shape[1]
    check(labels.dtype == torch.int64 and labels.shape == (n,) and n <= THREADS, "labels must be int64 [n] of at most 256 images")
    return _permuted("permuted_labels", matrices, labels, permutations, _LABEL_PERMUTATIONS, -(2**0.5))


def _permuted(kernel: str, matrices: Tensor, permuted: Tensor, permutations: Tensor, each: int, factor: float) -> Tensor:
    """Launch a kernel of permuted.cu, whose warps have ``each`` permutations."""
    count, n, _ = matrices.shape
    check(matrices.dtype == torch.float64, "matrices must be float64 [k, n, n]")
    check(permutations.ndim == 2 and permutations.dtype == torch.int64 and permutations.shape[1] == n, "permutations must be int64 [p, n]")
    total = len(permutations)
    if total == 0:
        return matrices.new_empty(0, count)
    blocks, groups = warps(-(-total // each)), -(-count // _MATRICES)
    chunks = max(1, min(n, -(-full_grid(matrices) // (each * blocks * groups))))
    partial = matrices.new_empty(chunks, total, count)
    inputs = (matrices.contiguous(), permuted.contiguous(), permutations.contiguous())
    launch(matrices, "permuted", kernel, (blocks, chunks, groups), *inputs, count, n, total, factor / (n * (n - 3)), partial)
    return partial.sum(0)


def influences(matrices: Tensor) -> Influences | None:
    """`moments.matrix_influences` of U-centred matrices [k, n, n], whose rows sum to zero; n <= `moments.SINGLE_IMAGES`."""
    count, n, _ = matrices.shape
    check(matrices.dtype == torch.float64 and n <= THREADS, "matrices must be float64 [k, n, n] of at most 256 images")
    if n <= moments.FEWEST:
        return None
    pairs = count * (count + 1) // 2
    rows = matrices.reshape(count * n, n)
    gram = rows @ rows.T
    first = matrices.new_empty(pairs, n)
    second = matrices.new_empty(pairs, n, n) if n - 2 >= moments.FEWEST else None
    slope = 2 * (n - 2) / ((n - 3) * (n - 4))
    after = (0.0, 0.0, 0.0)
    if second is not None:
        last = (n - 4) * (n - 5)
        after = (slope - 2 * (n - 3) / last, (2 + 4 / (n - 4) + 4 / ((n - 3) * (n - 4))) / (n - 5), -2 / last)
    factors = [np.float64(factor) for factor in (slope, *after)]
    launch(matrices, "influences", "influences", (n, pairs, 1), rows, gram, count, n, *factors, first, second)
    return Influences(first, second)
