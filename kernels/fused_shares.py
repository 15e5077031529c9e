"""Distances, and the shares of images and positions, on a GPU: `kdx.kernels.positions` by the kernels of shares.cu.

As in `kdx.kernels.fused`: nothing depends on the order in which blocks run, and a wrong shape or type is a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels import fused, geometry
from kdx.kernels.decomposition import in_contexts
from kdx.kernels.launches import check, launch
from kdx.kernels.precision import ieee_float32

_WARP = 32

_POSITIONS = 64
"""Positions per block of the kernel that brings features into rows."""

_AT_ONCE = 4
"""Shares per block of the kernel that sums over pairs."""

_SQUARES = 1 << 26
"""The most squared differences in memory at once; a strip of images has no more of them."""

_ELEMENTS = 1 << 31
"""Elements of an image that a kernel can count in 32 bits."""

_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, eq=False)
class PositionSquares:
    """`kdx.kernels.positions.PositionGeometry` of features [n, C, P] by the kernels.

    rows [P, n, C]: the features minus their mean over the images, float32. norms [P, n]: |F_i(p)|^2 of the rows. squares [n, n, P]:
    |F_i(p) - F_j(p)|^2 of the pairs i < j, or None where they do not fit into memory at once; then each call of ``shares`` computes
    them again, a strip at a time. distances: float64 [n, n].
    """

    features: Tensor
    rows: Tensor
    norms: Tensor
    squares: Tensor | None
    distances: Tensor

    @classmethod
    def of(cls, features: Tensor) -> PositionSquares:
        """features: float32, float16 or bfloat16 [n, C, P], finite."""
        n, channels, positions = features.shape
        check(features.dtype in _TYPES, "features must be float32, float16 or bfloat16")
        check(channels * positions < _ELEMENTS, f"an image must have fewer than {_ELEMENTS} elements")
        features = features.contiguous()
        rows = torch.empty(positions, n, channels, dtype=torch.float32, device=features.device)
        grid = (n * -(-channels // _WARP), -(-positions // _POSITIONS), 1)
        mean = features.mean(0, dtype=torch.float32)
        launch(features, "shares", f"shares_rows_{_TYPES[features.dtype]}", grid, features, mean, n, channels, positions, rows)
        norms = torch.linalg.vector_norm(rows, dim=2).square_()
        if _strip(n, positions) < n:
            flat = geometry.wide(features.flatten(1))
            return cls(features, rows, norms, None, fused.distances(flat - flat.mean(0)).double())
        distances = torch.zeros(n, n, dtype=torch.float64, device=features.device)
        return cls(features, rows, norms, _squares(features, rows, norms, 0, n, distances), distances)

    def shares(self, matrices: Tensor, contexts: Sequence[slice]) -> Tensor:
        positions, n, _ = self.rows.shape
        check(matrices.ndim == 3 and matrices.shape[1:] == (n, n) and matrices.dtype == torch.float64, "matrices must be float64 [m, n, n]")
        weights = in_contexts(geometry.pair_weights(matrices, self.distances), contexts)
        result = matrices.new_zeros(len(contexts), len(matrices), n, positions)
        first = 0
        while first < n:
            strip = _strip(n - first, positions)
            squares = _squares(self.features, self.rows, self.norms, first, strip) if self.squares is None else self.squares
            _contract(squares, weights.flatten(0, 1), result.flatten(0, 1), first)
            first += strip
        return result


def _squares(features: Tensor, rows: Tensor, norms: Tensor, first: int, strip: int, distances: Tensor | None = None) -> Tensor:
    """|F_i(p) - F_j(p)|^2 [strip, count, P] of the strip's images i before all others, with their ``distances`` if requested."""
    positions, n, channels = rows.shape
    count = n - first
    with ieee_float32():
        products = torch.bmm(rows[:, first : first + strip], rows[:, first:].mT)
    squares = torch.empty(strip, count, positions, dtype=torch.float32, device=rows.device)
    sizes = (n, first, count, channels, positions)
    grid = (strip, -(-count // _WARP), 1)
    inputs = (products, features, norms, norms.sum(0))
    launch(rows, "shares", f"shares_squares_{_TYPES[features.dtype]}", grid, *inputs, fused.near(), *sizes, squares, distances)
    return squares


def _contract(squares: Tensor, weights: Tensor, shares: Tensor, first: int) -> None:
    """Add the part of a strip that begins at the image ``first`` to the shares [k, n, P] with weights [k, n, n]."""
    rows, count, positions = squares.shape
    matrices, n, _ = weights.shape
    slices = -(-positions // _WARP)
    grid = (count, slices, -(-matrices // _AT_ONCE))
    sizes = (matrices, n, rows, count, positions, -(-positions // slices))
    launch(squares, "shares", "shares_contract", grid, squares, weights[:, first:, first:], *sizes, shares[:, first:])


def _strip(count: int, positions: int) -> int:
    """The number of images in the first strip of ``count`` images."""
    return max(1, min(count, _SQUARES // (count * positions)))
