"""Distances, and the shares of images and positions, on a GPU: `kdx.kernels.positions` by the kernels of shares.cu.

As in `kdx.kernels.fused`: nothing depends on the order in which blocks run, and a wrong shape or type is a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels import cuda, fused, geometry
from kdx.kernels.decomposition import in_contexts
from kdx.kernels.launches import check, launch

_WARP = 32
_ROWS, _COLUMNS = 32, 16
"""Images per block on the two sides of its pairs."""

_AT_ONCE = 4
"""Shares per block of the kernel that sums over pairs."""

_BLOCKS_PER_MULTIPROCESSOR = 2
"""Each part of the channels writes all squared differences, so there are no more parts than the device needs."""

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


@dataclass(frozen=True, eq=False)
class PositionSquares:
    """`kdx.kernels.positions.PositionGeometry` of features [n, C, P] by the kernels.

    squares: |F_i(p) - F_j(p)|^2 of all pairs, or None where they do not fit into memory at once; then each call of ``shares`` computes
    them again, a strip at a time. distances: float64 [n, n].
    """

    features: Tensor
    squares: Tensor | None
    distances: Tensor

    @classmethod
    def of(cls, features: Tensor) -> PositionSquares:
        """features: float32, float16 or bfloat16 [n, C, P], finite."""
        n, channels, positions = features.shape
        check(features.dtype in _KERNELS, "features must be float32, float16 or bfloat16")
        check(channels * positions < _ELEMENTS, f"an image must have fewer than {_ELEMENTS} elements")
        features = features.contiguous()
        strip = _strip(features)
        if strip.rows < n:
            rows = geometry.wide(features.flatten(1))
            return cls(features, None, fused.distances(rows - rows.mean(0)).double())
        squares = _squares(features, strip)
        upper = squares.sum((0, 3), dtype=torch.float64).triu(1).sqrt()
        return cls(features, squares, upper + upper.T)

    def shares(self, matrices: Tensor, contexts: Sequence[slice]) -> Tensor:
        n, _, positions = self.features.shape
        check(matrices.ndim == 3 and matrices.shape[1:] == (n, n) and matrices.dtype == torch.float64, "matrices must be float64 [m, n, n]")
        weights = in_contexts(geometry.pair_weights(matrices, self.distances), contexts)
        result = matrices.new_zeros(len(contexts), len(matrices), n, positions)
        first = 0
        while first < n:
            features = self.features[first:]
            strip = _strip(features)
            squares = _squares(features, strip) if self.squares is None else self.squares
            _contract(squares, weights.flatten(0, 1), result.flatten(0, 1), first)
            first += strip.rows
        return result


def _squares(features: Tensor, strip: _Strip) -> Tensor:
    """|F_i(p) - F_j(p)|^2 [splits, rows, n, P] of the strip's images i before all others, for each part of the channels."""
    n, channels, positions = features.shape
    squares = torch.empty(strip.splits, strip.rows, n, positions, dtype=torch.float32, device=features.device)
    lanes = _lanes(positions)
    tiles = -(-strip.rows // _ROWS) * -(-n // _COLUMNS)
    shape = (strip.rows, n, channels, positions, lanes.lanes, lanes.groups, strip.channels_per_block)
    launch(features, "shares", _KERNELS[features.dtype], (tiles, lanes.slices, strip.splits), features, *shape, squares)
    return squares


def _contract(squares: Tensor, weights: Tensor, shares: Tensor, first: int) -> None:
    """Add the part of a strip that begins at the image ``first`` to the shares [k, n, P] with weights [k, n, n]."""
    splits, rows, count, positions = squares.shape
    matrices, n, _ = weights.shape
    lanes = _lanes(positions)
    grid = (count, lanes.slices, -(-matrices // _AT_ONCE))
    sizes = (matrices, n, rows, count, positions, lanes.lanes, splits)
    launch(squares, "shares", "shares_contract", grid, squares, weights[:, first:, first:], *sizes, shares[:, first:])


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
    """The pairs of the first ``rows`` images with all others, in ``splits`` parts of the channels."""

    rows: int
    splits: int
    channels_per_block: int


def _strip(features: Tensor) -> _Strip:
    """The largest strip of these images."""
    count, channels, positions = features.shape
    lanes = _lanes(positions)
    steps = -(-channels // lanes.groups)
    row_tiles, column_tiles = -(-count // _ROWS), -(-count // _COLUMNS)
    blocks = -(-row_tiles * column_tiles // 2) * lanes.slices  # half of the tiles lie above the diagonal
    wanted = -(-_BLOCKS_PER_MULTIPROCESSOR * cuda.launcher(features.device).multiprocessors // blocks)
    splits = max(-(-steps // _MOST_CHANNELS), min(wanted, steps // _LEAST_CHANNELS), 1)
    channels_per_block = lanes.groups * -(-steps // splits)
    splits = -(-channels // channels_per_block)
    rows = max(1, min(count, _SQUARES // (splits * count * positions)))
    return _Strip(rows, splits, channels_per_block)
