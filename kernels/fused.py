"""The geometry on a GPU: each function one or two launches of the kernels beside this file, with the results of `geometry.py`.

Distances are float32 and everything made of them float64. Nothing here depends on the order in which blocks run: the same call
gives the same bits. Tensors of one call are on one device; whether it can run the kernels is `cuda.runs`'s to say.

A wrong shape or type is a ValueError: users' mistakes are found before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdx.kernels import cuda, geometry

Objective = Literal["relevance", "uniqueness"]

_THREADS = 256
_TILE = 64
"""Side of a tile of distances."""
_ROWS, _CHANNELS = 16, 128
"""Images and channels of a block that weighs."""
_BLOCKS_EACH = 8
"""Blocks that a multiprocessor is given: more than it holds at once, so that all end at about the same time."""

_ELEMENTS = 1 << 24
"""Up to so many elements the Gram products of all blocks of columns are made at once: a small one alone does not fill the device."""

_ROUNDING = (100 * torch.finfo(torch.float32).eps) ** 2
"""The share of a derivative's square that is rounding where R is all of A: `geometry.laplacian`'s rule. Its sums are here differences
of float64 inner products, and its distances float32."""


@dataclass(frozen=True)
class Distances:
    """Distances [..., n, n] in float32, symmetric bit for bit, and their row sums [..., n] in float64."""

    matrix: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Tile:
    """Distances [q, m] in float32 with the sums of its rows [q] and columns [m] in float64."""

    matrix: Tensor
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Products:
    """What one pass over K distance matrices gives, all float64.

    inner: <A,B> of the U-centred matrices [B, K, K], with <A,A> zero where centring leaves only rounding; rows: row sums of the
    distances [B, K, n]; totals: their sums [B, K]; squares: sum_ij D_ij^2 [B, K].
    """

    inner: Tensor
    rows: Tensor
    totals: Tensor
    squares: Tensor


@dataclass(frozen=True)
class ChannelWeights:
    """Channel weights [S, n, C], score L and left = ||R||/||D|| [S], all float64; lap [S, n, n] where it was asked for."""

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


@dataclass(frozen=True)
class Cam:
    """Maps [n, H, W] after ReLU, and scaled to [0, 1] and resized [n, h, w] where a size was given; float32."""

    maps: Tensor
    resized: Tensor | None


# Distances


def distances(x: Tensor) -> Distances:
    """||x_i - x_j|| of float32 rows x [n, d] or [B, n, d], less their mean: `geometry.distances`."""
    _check(x.ndim in (2, 3) and x.dtype == torch.float32, "x must be float32 [n, d] or [B, n, d]")
    rows = x.reshape(-1, *x.shape[-2:]).contiguous()
    matrix, sums = _symmetric(rows, rows.square().sum(-1))
    return Distances(matrix.view(*x.shape[:-1], x.shape[-2]), sums.view(x.shape[:-1]))


def tile(x: Tensor, y: Tensor, norms_x: Tensor, norms_y: Tensor, diagonal: bool) -> Tile:
    """||x_i - y_j|| of float32 rows x [q, d] and y [m, d], less one centre, with their squared norms: `geometry.centred_distances`.

    diagonal: y is x, and every image at distance zero from itself.
    """
    _check(x.ndim == y.ndim == 2 and x.dtype == y.dtype == torch.float32, "x and y must be float32 [q, d] and [m, d]")
    _check(x.shape[1] == y.shape[1], "x and y must be of one width")
    x, norms_x = x.contiguous(), norms_x.float().contiguous()
    if diagonal:
        matrix, sums = _symmetric(x[None], norms_x[None])
        return Tile(matrix[0], sums[0], sums[0])
    y, norms_y = y.contiguous(), norms_y.float().contiguous()
    (q, d), m = x.shape, y.shape[0]
    gram = _gram(x[None], y[None])[0]
    grid = (-(-m // _TILE), -(-q // _TILE), 1)
    rows, columns = (torch.empty(shape, dtype=torch.float64, device=x.device) for shape in ((grid[0], q), (grid[1], m)))
    _launch(x, "pairwise", "pairwise_cross", grid, gram, x, y, norms_x, norms_y, _near(), q, m, d, rows, columns)
    return Tile(gram, rows.sum(0), columns.sum(0))


def _symmetric(x: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [B, n, n] and their row sums [B, n] of contiguous rows x [B, n, d]."""
    count, n, d = x.shape
    gram = _gram(x, x)
    tiles = -(-n // _TILE)
    sums = torch.empty(count, tiles, n, dtype=torch.float64, device=x.device)
    _launch(x, "pairwise", "pairwise_symmetric", (count, tiles, tiles), gram, x, norms, _near(), n, d, sums)
    return gram, sums.sum(1)


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """x y^T [B, q, m] in full float32, added up over the blocks of columns that `geometry` takes."""
    rows = geometry.blocks(x)
    columns = rows if x is y else geometry.blocks(y)
    blocks = rows.shape[1]
    with _full_precision():
        if len(x) == 1 and 1 < blocks <= _ELEMENTS // (x.shape[1] * y.shape[1]):
            return torch.bmm(rows[0], columns[0].mT).sum(0, keepdim=True)
        gram = torch.bmm(rows[:, 0], columns[:, 0].mT)
        for block in range(1, blocks):
            gram.baddbmm_(rows[:, block], columns[:, block].mT)
        return gram


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products without TF32, whose ten bits would be all that is left of a distance."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _near() -> np.float32:
    return np.float32(geometry.REPAIR_BELOW[torch.float32])


# Inner products


@dataclass(frozen=True)
class _Sums:
    """Sums over distances less a typical one of each matrix: products in parts [B, chunks, K, K], rows [B, K, n], what was taken [B, K]."""

    partial: Tensor
    rows: Tensor
    shifts: Tensor


def products(d: Tensor) -> Products:
    """Every <A,B> of the U-centred matrices of raw distances d [B, K, n, n], float32 or float64: `geometry.products` of `u_centered`.

    d: symmetric with zero diagonals, n >= 4. Any strides of its first two dimensions; others cost a copy.
    """
    _check(d.ndim == 4 and d.shape[-1] == d.shape[-2] and d.dtype in (torch.float32, torch.float64), "d must be [B, K, n, n]")
    _check(d.shape[-1] >= 4, "U-centring needs four images")
    count, matrices, n, _ = d.shape
    sums = _sums(d)
    found = _empty_products(count, matrices, n, d.device)
    chunks = sums.partial.shape[1]
    grid = (count, _warps(_pairs(matrices)), 1)
    _launch(d, "products", "products_close", grid, sums.partial, sums.rows, sums.shifts, matrices, n, chunks, *found)
    return Products(*found)


def _bordered_products(inside: Tensor, border: Tensor) -> Products:
    """`products` for each of q queries behind m images: inside [K, m, m] among them, border [K, q, m] to them; B = q and n = m + 1."""
    matrices, q, m = border.shape
    sums = _sums(inside[None])
    found = _empty_products(q, matrices, m + 1, border.device)
    chunks = sums.partial.shape[1]
    grid = (q, _warps(_pairs(matrices)), 1)
    _launch(border, "products", "products_bordered", grid, sums.partial, sums.rows, sums.shifts, border, matrices, m, chunks, *found)
    return Products(*found)


def _sums(d: Tensor) -> _Sums:
    """One pass over d [B, K, n, n]."""
    count, matrices, n, _ = d.shape
    if d.stride(-1) != 1 or d.stride(-2) != n:
        d = d.contiguous()
    pairs = _pairs(-(-matrices // 4))
    chunks = max(1, min(-(-n // 8), -(-_wanted(d) // (count * pairs))))
    each = 8 * -(-n // (8 * chunks))
    chunks = -(-n // each)
    steps = [d.data_ptr(), n * d.element_size(), d.stride(0) * d.element_size(), d.stride(1) * d.element_size()]
    wide = all(step % 16 == 0 for step in steps)
    sizes = ((count, chunks, matrices, matrices), (count, matrices, n), (count, matrices))
    sums = _Sums(*(torch.empty(size, dtype=torch.float64, device=d.device) for size in sizes))
    kernel = "products_float32" if d.dtype == torch.float32 else "products_float64"
    strides = (np.int64(d.stride(0)), np.int64(d.stride(1)))
    grid = (count * pairs, chunks, 1)
    _launch(d, "products", kernel, grid, d, *strides, matrices, n, wide, pairs, each, sums.partial, sums.rows, sums.shifts)
    return sums


def _empty_products(count: int, matrices: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = ((count, matrices, matrices), (count, matrices, n), (count, matrices), (count, matrices))
    inner, rows, totals, squares = (torch.empty(size, dtype=torch.float64, device=device) for size in sizes)
    return inner, rows, totals, squares


# Weights


def weights(
    d: Tensor, given: Tensor, target: Tensor, means: Tensor, objective: Objective = "relevance", *, lap: bool = False
) -> ChannelWeights:
    """Channel weights Lap means of a stack of batches, the score and what is left: `geometry.laplacian` and `geometry.gradient`.

    d, given, target: float32 distances [S, n, n] of the explained features, the given ones and the target; means: float64 spatial means
    of the explained features [S, n, C]. lap: give Lap as well. n >= 4.
    """
    stack, n, channels = means.shape
    _check(d.shape == given.shape == target.shape == (stack, n, n), "distances must be [S, n, n] for means [S, n, C]")
    _check(
        d.dtype == given.dtype == target.dtype == torch.float32 and means.dtype == torch.float64, "distances must be float32, means float64"
    )
    matrices = torch.stack((d, given, target), 1)
    of = products(matrices)
    placed = (matrices, of.inner, of.rows, of.totals, of.squares)
    extra = _maxima("weights_maxima", placed, stack, n) if objective == "uniqueness" else ()
    found, score, left = (means.new_empty(size) for size in ((stack, n, channels), (stack,), (stack,)))
    matrix = means.new_empty(stack, n, n) if lap else None
    grid = (stack, -(-n // _ROWS), -(-channels // _CHANNELS))
    results = (found, matrix, score, left)
    _launch(d, "weights", f"weights_{objective}", grid, *placed, *extra, stack, n, means.contiguous(), channels, _ROUNDING, *results)
    return ChannelWeights(found, score, left, matrix)


def query_weights(
    inside: tuple[Tensor, Tensor, Tensor],
    border: tuple[Tensor, Tensor, Tensor],
    queries: Tensor,
    references: Tensor,
    objective: Objective = "relevance",
) -> QueryWeights:
    """Each query's row of `weights` where it stands behind the references, as `geometry.bordered` places it.

    inside: float32 distances [m, m] among references of explained features, given ones and target; border: [q, m] from queries to
    references; queries [q, C] and references [m, C]: float64 spatial means of the explained features. m >= 3. Relevance takes O(q m)
    besides the references' own products, uniqueness O(q m^2).
    """
    (q, channels), m = queries.shape, references.shape[0]
    _check(all(matrix.shape == (m, m) and matrix.dtype == torch.float32 for matrix in inside), "inside must be float32 [m, m]")
    _check(all(matrix.shape == (q, m) and matrix.dtype == torch.float32 for matrix in border), "border must be float32 [q, m]")
    _check(references.shape[1] == channels and queries.dtype == references.dtype == torch.float64, "means must be float64 [., C]")
    _check(m >= 3, "U-centring needs four images")
    among, to = torch.stack(inside), torch.stack(border)
    of = _bordered_products(among, to)
    placed = (among, to, of.inner, of.rows, of.totals, of.squares)
    extra = _maxima("query_maxima", placed, q, m + 1) if objective == "uniqueness" else ()
    found, score, left = (queries.new_empty(size) for size in ((q, channels), (q,), (q,)))
    means = (queries.contiguous(), references.contiguous())
    grid = (1, -(-q // _ROWS), -(-channels // _CHANNELS))
    results = (found, score, left)
    _launch(to, "weights", f"query_weights_{objective}", grid, *placed, *extra, q, m + 1, *means, channels, _ROUNDING, *results)
    return QueryWeights(found, score, left)


def _maxima(kernel: str, placed: tuple[Tensor, ...], stack: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's first maximum of R: its column and how many rows have theirs in a column [S, n], R and B there [S, n]."""
    device = placed[0].device
    where = torch.empty(stack, n, dtype=torch.int32, device=device)
    count = torch.zeros_like(where)
    best, picked = (torch.empty(stack, n, dtype=torch.float64, device=device) for _ in range(2))
    _launch(where, "weights", kernel, (_warps(stack * n), 1, 1), *placed, stack, n, where, count, best, picked)
    return where, count, best, picked


# Maps


def cam(features: Tensor, channel_weights: Tensor, size: tuple[int, int] | None = None) -> Cam:
    """ReLU(sum_c a_ic F_ic) of float32, float16 or bfloat16 features [n, C, H, W] and weights [n, C], in one read of the features.

    size: (h, w) that maps are resized to (bilinear) after they are scaled to [0, 1] one by one; a constant map becomes zero.
    As `geometry.cam`, `geometry.scaled` and `torch.nn.functional.interpolate` with align_corners=False.
    """
    kernel = {torch.float32: "cam_float32", torch.float16: "cam_float16", torch.bfloat16: "cam_bfloat16"}.get(features.dtype)
    _check(features.ndim == 4 and kernel is not None, "features must be float32, float16 or bfloat16 [n, C, H, W]")
    _check(channel_weights.shape == features.shape[:2], "weights must be [n, C]")
    features, channel_weights = features.contiguous(), channel_weights.float().contiguous()
    n, channels, height, width = features.shape
    plan = _plan(features, _wanted(features))
    partial = torch.empty(n, plan.splits, height, width, device=features.device)
    finished = torch.zeros(n, dtype=torch.int32, device=features.device)
    maps = torch.empty(n, height, width, device=features.device)
    resized = torch.empty(n, *size, device=features.device) if size else None
    shape = (channels, height, width, plan.period, plan.lanes, plan.each, plan.wide)
    results = (partial, finished, maps, resized, *(size or (0, 0)))
    _launch(features, "cam", str(kernel), (n, plan.slices, plan.splits), features, channel_weights, *shape, *results)
    return Cam(maps, resized)


@dataclass(frozen=True)
class _Plan:
    """How blocks share an image: see cam.cu. period and lanes in packs, each in periods."""

    wide: bool
    period: int
    lanes: int
    slices: int
    each: int
    splits: int


def _plan(features: Tensor, blocks: int) -> _Plan:
    n, channels, height, width = features.shape
    positions, pack = height * width, 16 // features.element_size()
    period = positions // gcd(positions, pack)
    aligned = features.data_ptr() % 16 == 0 and channels * positions % pack == 0
    wide = aligned and positions >= pack and (period <= _THREADS or positions % pack == 0)
    if not wide:
        pack, period = 1, positions
    lanes = min(period, _THREADS)
    slices = -(-period // lanes)
    periods = -(-channels * positions // (pack * period))
    # As many blocks as are wanted, as long as each thread has four packs.
    splits = max(1, min(-(-blocks // (n * slices)), periods // (4 * (_THREADS // lanes))))
    each = -(-periods // splits)
    return _Plan(wide, period, lanes, slices, each, -(-periods // each))


# Launches


def _launch(on: Tensor, source: str, kernel: str, grid: tuple[int, int, int], *arguments: Tensor | np.generic | float | None) -> None:
    """Launches a kernel on a tensor's device. Python's integers go as int, its other numbers as double."""
    given = [np.int32(value) if isinstance(value, int) else np.float64(value) if isinstance(value, float) else value for value in arguments]
    cuda.launcher(on.device).launch(source, kernel, grid, (_THREADS, 1, 1), given)


def _wanted(on: Tensor) -> int:
    """Blocks that fill the device."""
    return _BLOCKS_EACH * cuda.launcher(on.device).multiprocessors


def _pairs(count: int) -> int:
    return count * (count + 1) // 2


def _warps(count: int) -> int:
    """Blocks with a warp for each of so many."""
    return -(-count // (_THREADS // 32))


def _check(holds: bool, demand: str) -> None:
    if not holds:
        raise ValueError(demand)
