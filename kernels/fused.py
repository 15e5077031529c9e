"""The geometry on a GPU: each function makes one or two launches of the kernels in this folder and returns the results of `geometry.py`.

Distances are float32, and everything computed from them is float64. Nothing depends on the order in which blocks run: the same call
gives the same bits. All tensors of a call are on one device; `cuda.runs` decides whether the kernels can run there.

A wrong shape or type is a ValueError: callers check what users give before they call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.kernels import geometry
from kdx.kernels.launches import check, full_grid, launch, warps
from kdx.kernels.precision import ieee_float32

_TILE = 64
"""Side of a tile of distances."""
_ROWS, _CHANNELS = 16, 128
"""Images and channels per block of the weights kernels."""

_ELEMENTS = 1 << 24
"""Up to this many elements, the Gram products of all blocks of columns are computed at once: a small product alone does not fill the
device."""

_ROUNDING = (100 * torch.finfo(torch.float32).eps) ** 2
"""The share of a derivative's squared norm that is rounding if R is all of A, as in `geometry.laplacian`. Here its sums are differences
of float64 inner products, and its distances are float32."""


@dataclass(frozen=True)
class Products:
    """The results of one pass over K distance matrices, all float64.

    inner: <A,B> of the U-centred matrices [B, K, K], with <A,A> zero if centring leaves only rounding; row_sums: of the
    distances [B, K, n]; totals: their sums [B, K]; squares: sum_ij D_ij^2 [B, K].
    """

    inner: Tensor
    row_sums: Tensor
    totals: Tensor
    squares: Tensor


@dataclass(frozen=True)
class ChannelWeights:
    """Channel weights [S, n, C], score L and left = ||R||/||D|| [S], all float64; lap [S, n, n] if requested."""

    channel_weights: Tensor
    score: Tensor
    left: Tensor
    lap: Tensor | None


@dataclass(frozen=True)
class QueryWeights:
    """Channel weights [q, C], score L and left = ||R||/||D|| [q] of each query among the references, all float64."""

    channel_weights: Tensor
    score: Tensor
    left: Tensor


# Distances


def distances(x: Tensor) -> Tensor:
    """Float32 ||x_i - x_j|| [..., n, n] of float32 rows x [n, d] or [B, n, d], minus their mean: `geometry.distances`.

    Symmetric bit for bit.
    """
    check(x.ndim in (2, 3) and x.dtype == torch.float32, "x must be float32 [n, d] or [B, n, d]")
    rows = x.reshape(-1, *x.shape[-2:]).contiguous()
    return _symmetric(rows).view(*x.shape[:-1], x.shape[-2])


def centred_distances(x: Tensor, y: Tensor, norms_x: Tensor, norms_y: Tensor) -> Tensor:
    """Float32 ||x_i - y_j|| [q, m] of float32 rows x [q, d] and y [m, d], minus one centre, with their squared norms.

    As `geometry.centred_distances`: if x is y, each image is at distance zero from itself.
    """
    check(x.ndim == y.ndim == 2 and x.dtype == y.dtype == torch.float32, "x and y must be float32 [q, d] and [m, d]")
    check(x.shape[1] == y.shape[1], "x and y must have the same width")
    same = x is y
    x, norms_x = x.contiguous(), norms_x.float().contiguous()
    if same:
        return _symmetric(x[None])[0]
    y, norms_y = y.contiguous(), norms_y.float().contiguous()
    (q, d), m = x.shape, y.shape[0]
    matrix = _gram(x[None], y[None])[0]
    launch(x, "pairwise", "pairwise_cross", (-(-m // _TILE), -(-q // _TILE), 1), matrix, x, y, norms_x, norms_y, near(), q, m, d)
    return matrix


def _symmetric(x: Tensor) -> Tensor:
    """Distances [B, n, n] of contiguous rows x [B, n, d]."""
    count, n, d = x.shape
    matrices = _gram(x, x)
    norms = matrices.diagonal(dim1=1, dim2=2).contiguous()  # rounded as the products beside them
    tiles = -(-n // _TILE)
    launch(x, "pairwise", "pairwise_symmetric", (count, tiles, tiles), matrices, x, norms, near(), n, d)
    return matrices


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """x y^T [B, q, m] in full float32, summed over the same blocks of columns as in `geometry`."""
    rows = geometry.blocks(x)
    columns = rows if x is y else geometry.blocks(y)
    blocks = rows.shape[1]
    with ieee_float32():
        if len(x) == 1 and 1 < blocks <= _ELEMENTS // (x.shape[1] * y.shape[1]):
            return torch.bmm(rows[0], columns[0].mT).sum(0, keepdim=True)
        gram = torch.bmm(rows[:, 0], columns[:, 0].mT)
        for block in range(1, blocks):
            gram.baddbmm_(rows[:, block], columns[:, block].mT)
        return gram


def near() -> np.float32:
    """The share of the squared norms below which a squared distance is computed from the features."""
    return np.float32(geometry.REPAIR_BELOW[torch.float32])


# Inner products


@dataclass(frozen=True)
class _Sums:
    """Sums over distances minus a typical distance per matrix: partial products [B, chunks, K, K], row sums [B, K, n], and the typical
    distances [B, K]."""

    partial: Tensor
    row_sums: Tensor
    shifts: Tensor


def products(d: Tensor) -> Products:
    """Every <A,B> of the U-centred matrices of raw distances d [B, K, n, n], float32 or float64: `geometry.products` of `u_centered`.

    d: symmetric with zero diagonals, n >= 4. The first two dimensions may have any strides; the others must be contiguous, or are copied.
    """
    check(d.ndim == 4 and d.shape[-1] == d.shape[-2] and d.dtype in (torch.float32, torch.float64), "d must be [B, K, n, n]")
    check(d.shape[-1] >= 4, "U-centring needs four images")
    count, matrices, n, _ = d.shape
    sums = _sums(d)
    results = _empty_products(count, matrices, n, d.device)
    chunks = sums.partial.shape[1]
    grid = (count, warps(_pair_count(matrices)), 1)
    launch(d, "products", "products_close", grid, sums.partial, sums.row_sums, sums.shifts, matrices, n, chunks, *results)
    return Products(*results)


def _bordered_products(inside: Tensor, border: Tensor) -> Products:
    """`products` of each of q queries after m images, with B = q and n = m + 1.

    inside: the distances [K, m, m] among the images; border: [K, q, m] from queries to images.
    """
    matrices, q, m = border.shape
    sums = _sums(inside[None])
    results = _empty_products(q, matrices, m + 1, border.device)
    chunks = sums.partial.shape[1]
    grid = (q, warps(_pair_count(matrices)), 1)
    launch(border, "products", "products_bordered", grid, sums.partial, sums.row_sums, sums.shifts, border, matrices, m, chunks, *results)
    return Products(*results)


def _sums(d: Tensor) -> _Sums:
    """One pass over d [B, K, n, n]."""
    count, matrices, n, _ = d.shape
    if d.stride(-1) != 1 or d.stride(-2) != n:
        d = d.contiguous()
    pairs = _pair_count(-(-matrices // 4))
    chunks = max(1, min(-(-n // 8), -(-full_grid(d) // (count * pairs))))
    rows_per_block = 8 * -(-n // (8 * chunks))
    chunks = -(-n // rows_per_block)
    steps = [d.data_ptr(), n * d.element_size(), d.stride(0) * d.element_size(), d.stride(1) * d.element_size()]
    wide = all(step % 16 == 0 for step in steps)
    sizes = ((count, chunks, matrices, matrices), (count, matrices, n), (count, matrices))
    sums = _Sums(*(torch.empty(size, dtype=torch.float64, device=d.device) for size in sizes))
    kernel = "products_float32" if d.dtype == torch.float32 else "products_float64"
    strides = (np.int64(d.stride(0)), np.int64(d.stride(1)))
    grid = (count * pairs, chunks, 1)
    launch(d, "products", kernel, grid, d, *strides, matrices, n, wide, pairs, rows_per_block, sums.partial, sums.row_sums, sums.shifts)
    return sums


def _empty_products(count: int, matrices: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = ((count, matrices, matrices), (count, matrices, n), (count, matrices), (count, matrices))
    inner, row_sums, totals, squares = (torch.empty(size, dtype=torch.float64, device=device) for size in sizes)
    return inner, row_sums, totals, squares


# Weights


def weights(
    d: Tensor, given: Tensor, target: Tensor, means: Tensor, objective: ObjectiveName = "relevance", *, lap: bool = False
) -> ChannelWeights:
    """Channel weights Lap means, score and left of a stack of batches: `geometry.laplacian` and `geometry.gradient`.

    d, given, target: float32 distances [S, n, n] of the explained features, of the given features and of the target; means: float64
    spatial means of the explained features [S, n, C]. lap: return Lap as well. n >= 4.
    """
    stack, n, _ = means.shape
    check(d.shape == given.shape == target.shape == (stack, n, n), "distances must be [S, n, n] for means [S, n, C]")
    check(d.dtype == given.dtype == target.dtype, "distances must be float32, means float64")
    return stacked_weights(torch.stack((d, given, target), 1), means, objective, lap=lap)


def stacked_weights(matrices: Tensor, means: Tensor, objective: ObjectiveName = "relevance", *, lap: bool = False) -> ChannelWeights:
    """`weights`, from the three distances as one stack [S, 3, n, n]."""
    stack, n, channels = means.shape
    check(matrices.shape == (stack, 3, n, n), "distances must be [S, 3, n, n] for means [S, n, C]")
    check(matrices.dtype == torch.float32 and means.dtype == torch.float64, "distances must be float32, means float64")
    matrices = matrices.contiguous()
    sums = products(matrices)
    inputs = (matrices, sums.inner, sums.row_sums, sums.totals, sums.squares)
    maxima = _maxima("weights_maxima", inputs, stack, n) if objective == "uniqueness" else ()
    channel_weights, score, left = (means.new_empty(size) for size in ((stack, n, channels), (stack,), (stack,)))
    matrix = means.new_empty(stack, n, n) if lap else None
    grid = (stack, -(-n // _ROWS), max(1, -(-channels // _CHANNELS)))
    results = (channel_weights, matrix, score, left)
    launch(matrices, "weights", f"weights_{objective}", grid, *inputs, *maxima, stack, n, means.contiguous(), channels, _ROUNDING, *results)
    return ChannelWeights(channel_weights, score, left, matrix)


def product_weights(matrices: Tensor, means: Tensor, objective: ObjectiveName = "relevance") -> ChannelWeights:
    """`stacked_weights` through Lap, whose product with the means cuBLAS computes in the tensor cores of a data-centre GPU."""
    solution = stacked_weights(matrices, means[:, :, :0], objective, lap=True)
    assert solution.lap is not None
    # As in `geometry.gradient`: the spatial means minus their mean over the images have less rounding.
    return replace(solution, channel_weights=torch.bmm(solution.lap, means - means.mean(1, keepdim=True)))


def query_weights(
    inside: tuple[Tensor, Tensor, Tensor],
    border: tuple[Tensor, Tensor, Tensor],
    queries: Tensor,
    references: Tensor,
    objective: ObjectiveName = "relevance",
) -> QueryWeights:
    """Each query's row of `weights`, if the query is the last image after the references, as in `geometry.bordered`.

    inside: float32 distances [m, m] among the references, of the explained features, the given features and the target; border: the
    same [q, m] from queries to references; queries [q, C] and references [m, C]: float64 spatial means of the explained features.
    m >= 3. In addition to the references' own products, relevance takes O(q m) and uniqueness O(q m^2).
    """
    (q, channels), m = queries.shape, references.shape[0]
    check(all(matrix.shape == (m, m) and matrix.dtype == torch.float32 for matrix in inside), "inside must be float32 [m, m]")
    check(all(matrix.shape == (q, m) and matrix.dtype == torch.float32 for matrix in border), "border must be float32 [q, m]")
    check(references.shape[1] == channels and queries.dtype == references.dtype == torch.float64, "means must be float64 [., C]")
    check(m >= 3, "U-centring needs four images")
    among, to = torch.stack(inside), torch.stack(border)
    sums = _bordered_products(among, to)
    inputs = (among, to, sums.inner, sums.row_sums, sums.totals, sums.squares)
    maxima = _maxima("query_maxima", inputs, q, m + 1) if objective == "uniqueness" else ()
    channel_weights, score, left = (queries.new_empty(size) for size in ((q, channels), (q,), (q,)))
    means = (queries.contiguous(), references.contiguous())
    grid = (1, -(-q // _ROWS), -(-channels // _CHANNELS))
    results = (channel_weights, score, left)
    launch(to, "weights", f"query_weights_{objective}", grid, *inputs, *maxima, q, m + 1, *means, channels, _ROUNDING, *results)
    return QueryWeights(channel_weights, score, left)


def _maxima(kernel: str, inputs: tuple[Tensor, ...], stack: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first maximum of each row of R: its column [S, n], the number of maxima in each column [S, n], and R and B there [S, n]."""
    device = inputs[0].device
    column = torch.empty(stack, n, dtype=torch.int32, device=device)
    count = torch.zeros_like(column)
    residual, given = (torch.empty(stack, n, dtype=torch.float64, device=device) for _ in range(2))
    launch(column, "weights", kernel, (warps(stack * n), 1, 1), *inputs, stack, n, column, count, residual, given)
    return column, count, residual, given


def _pair_count(count: int) -> int:
    return count * (count + 1) // 2
