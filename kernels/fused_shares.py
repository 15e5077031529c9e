"""The shares of images and positions on a GPU: `kdx.kernels.decomposition.shares` by the kernels of shares.cu.

As in `kdx.kernels.fused`: nothing depends on the order in which blocks run, and a wrong shape or type is a ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels import cuda
from kdx.kernels.launches import check, launch

_WARP = 32
_ROWS, _COLUMNS = 32, 16
"""Images per block on the two sides of its pairs."""

_BLOCKS_PER_MULTIPROCESSOR = 2
"""Each share of the channels writes all squared differences, so there are no more shares than the device needs."""

_LEAST_CHANNELS, _MOST_CHANNELS = 16, 1024
"""Channels of one float32 sum: fewer are not worth a block of their own, and more lose digits."""

_SQUARES = 1 << 26
"""The most squared differences in memory at once; a strip of images has no more of them."""

_ELEMENTS = 1 << 28
"""Elements of an image that a thread can count for its eight images in 32 bits."""

_KERNELS = {
    torch.float32: "shares_squares_float32",
    torch.float16: "shares_squares_float16",
    torch.bfloat16: "shares_squares_bfloat16",
}


def shares(features: Tensor, distances: Tensor, matrix: Tensor) -> Tensor:
    """c_i(p) = sum_j W_ij |F_i(p) - F_j(p)|^2 [n, P] in float64, with W_ij = matrix_ij/D_ij, and 0 where D_ij = 0.

    features [n, C, P]: float32, float16 or bfloat16, and finite. distances: theirs [n, n], float64 and symmetric. matrix: float64 [n, n].
    Squared differences are float32 and exact to its rounding, for close pairs too.
    """
    kernel = _KERNELS.get(features.dtype)
    check(features.ndim == 3 and kernel is not None, "features must be float32, float16 or bfloat16 [n, C, P]")
    n, channels, positions = features.shape
    check(channels * positions < _ELEMENTS, f"an image must have fewer than {_ELEMENTS} elements")
    check(distances.shape == matrix.shape == (n, n), "distances and matrix must be [n, n]")
    check(distances.dtype == matrix.dtype == torch.float64, "distances and matrix must be float64")
    features, distances, matrix = features.contiguous(), distances.contiguous(), matrix.contiguous()
    result = distances.new_zeros(n, positions)
    lanes = _lanes(positions)
    first = 0
    while first < n:
        strip = _strip(features[first:], lanes)
        count, rows, splits = n - first, strip.rows, strip.splits
        squares = torch.empty(splits, rows, count, positions, device=features.device)
        tiles = -(-rows // _ROWS) * -(-count // _COLUMNS)
        shape = (rows, count, channels, positions, lanes.lanes, lanes.groups, strip.channels_per_block)
        launch(features, "shares", str(kernel), (tiles, lanes.slices, splits), features[first:], *shape, squares)
        inputs = (squares, distances[first:, first:], matrix[first:, first:])
        sizes = (n, rows, count, positions, lanes.lanes, splits)
        launch(features, "shares", "shares_contract", (count, lanes.slices, 1), *inputs, *sizes, result[first:])
        first += rows
    return result


@dataclass(frozen=True)
class _Lanes:
    """How the lanes of a warp share the positions: ``slices`` of at most ``lanes`` positions, and ``groups`` channels side by side."""

    lanes: int
    groups: int
    slices: int


def _lanes(positions: int) -> _Lanes:
    slices = -(-positions // _WARP)
    lanes = -(-positions // slices)
    return _Lanes(lanes, _WARP // lanes if slices == 1 else 1, slices)


@dataclass(frozen=True)
class _Strip:
    """The pairs of the first ``rows`` images with all others, in ``splits`` shares of the channels."""

    rows: int
    splits: int
    channels_per_block: int


def _strip(features: Tensor, lanes: _Lanes) -> _Strip:
    count, channels, positions = features.shape
    steps = -(-channels // lanes.groups)
    row_tiles, column_tiles = -(-count // _ROWS), -(-count // _COLUMNS)
    blocks = -(-row_tiles * column_tiles // 2) * lanes.slices  # half of the tiles lie above the diagonal
    wanted = -(-_BLOCKS_PER_MULTIPROCESSOR * cuda.launcher(features.device).multiprocessors // blocks)
    splits = max(-(-steps // _MOST_CHANNELS), min(wanted, steps // _LEAST_CHANNELS), 1)
    channels_per_block = lanes.groups * -(-steps // splits)
    splits = -(-channels // channels_per_block)
    rows = max(1, min(count, _SQUARES // (splits * count * positions)))
    return _Strip(rows, splits, channels_per_block)
