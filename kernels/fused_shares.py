"""Distances, and the shares of images and positions, on a GPU: `kdx.kernels.positions` by the kernels of shares.cu.

As in `kdx.kernels.fused`: nothing depends on the order in which blocks run, and a wrong shape or type is a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kdx.kernels import fused, geometry
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

    rows [P, n, C]: the features minus their mean over the images, float32. squares [n, n, P]: |F_i(p) - F_j(p)|^2 of the pairs i < j, or
    None where they do not fit into memory at once; then each call of ``shares`` computes them again, a strip at a time. norms [P, n]:
    |F_i(p)|^2 of the rows, for strips. distances: float64 [n, n].
    """

    features: Tensor
    rows: Tensor
    norms: Tensor | None
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
        if _strip(n, positions) < n:
            flat = geometry.wide(features.flatten(1))
            norms = torch.linalg.vector_norm(rows, dim=2).square_()
            return cls(features, rows, norms, None, fused.distances(flat - flat.mean(0)).double())
        distances = torch.empty(n, n, dtype=torch.float64, device=features.device)
        return cls(features, rows, None, _squares(features, rows, None, 0, n, distances), distances)

    def shares(self, matrices: Tensor, contexts: Sequence[slice]) -> Tensor:
        positions, n, _ = self.rows.shape
        check(matrices.ndim == 3 and matrices.shape[1:] == (n, n) and matrices.dtype == torch.float64, "matrices must be float64 [m, n, n]")
        result = matrices.new_empty(len(contexts), len(matrices), n, positions)
        bounds = _bounds(tuple(part.indices(n) for part in contexts), matrices.device)
        inputs = (matrices.contiguous(), self.distances, bounds)
        first = 0
        while first < n:
            strip = _strip(n - first, positions)
            squares = _squares(self.features, self.rows, self.norms, first, strip) if self.squares is None else self.squares
            _contract(squares, inputs, result, first)
            first += strip
        return result


@lru_cache(maxsize=64)
def _bounds(contexts: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """The start, stop and step [contexts, 3] of each context."""
    return torch.tensor(contexts, dtype=torch.int32, device=device)


def _squares(features: Tensor, rows: Tensor, norms: Tensor | None, first: int, strip: int, distances: Tensor | None = None) -> Tensor:
    """|F_i(p) - F_j(p)|^2 [strip, count, P] of the strip's images i before all others, with their ``distances`` if requested.

    norms: |F_i(p)|^2 [P, n], or None if the strip has all images; they are then the diagonals of the products, and rounded as these are.
    """
    positions, n, channels = rows.shape
    count = n - first
    with ieee_float32():
        products = torch.bmm(rows[:, first : first + strip], rows[:, first:].mT)
    norms = products.diagonal(dim1=1, dim2=2).contiguous() if norms is None else norms
    squares = torch.empty(strip, count, positions, dtype=torch.float32, device=rows.device)
    sizes = (n, first, count, channels, positions)
    grid = (strip, -(-count // _WARP), 1)
    inputs = (products, features, norms, norms.sum(0))
    launch(rows, "shares", f"shares_squares_{_TYPES[features.dtype]}", grid, *inputs, fused.near(), *sizes, squares, distances)
    return squares


def _contract(squares: Tensor, inputs: tuple[Tensor, Tensor, Tensor], shares: Tensor, first: int) -> None:
    """The part of a strip that begins at the image ``first`` of the shares [contexts, m, n, P], from matrices, distances and contexts."""
    rows, count, positions = squares.shape
    contexts, matrices, n, _ = shares.shape
    slices = -(-positions // _WARP)
    shared = contexts * matrices
    grid = (count, slices, -(-shared // _AT_ONCE))
    sizes = (matrices, shared, n, first, rows, count, positions, -(-positions // slices))
    launch(squares, "shares", "shares_contract", grid, squares, *inputs, *sizes, shares)


def _strip(count: int, positions: int) -> int:
    """The number of images in the first strip of ``count`` images."""
    return max(1, min(count, _SQUARES // (count * positions)))
