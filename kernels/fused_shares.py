"""Distances, and the shares of images and positions, on a GPU: `kdx.kernels.positions` by the kernels of shares.cu.

As in `kdx.kernels.fused`: nothing depends on the order in which blocks run, and a wrong shape or type is a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kdx.kernels import fused, geometry
from kdx.kernels.launches import check, launch
from kdx.kernels.precision import ieee_float32

_WARP = 32

MEAN_POSITIONS = 64
"""Positions per block of the kernel that brings features into rows."""

_CHANNELS = 128
"""Channels per block of the same kernel."""

_SAMPLED = 16
"""The number of images whose mean is the centre."""

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

    squares [n, n, P]: |F_i(p) - F_j(p)|^2 of the pairs i < j, or None where they do not fit into memory at once; then each call of
    ``shares`` computes them again, a strip at a time, from ``rows`` [P, n, C]: the features minus a centre, float32. distances: float64
    [n, n].
    """

    features: Tensor
    rows: Tensor | None
    squares: Tensor | None
    distances: Tensor

    @classmethod
    def of(cls, features: Tensor) -> PositionSquares:
        """features: float32, float16 or bfloat16 [n, C, P], finite."""
        return cls.of_each([features], [None])[0]

    @classmethod
    def of_each(cls, features: Sequence[Tensor], means: Sequence[Tensor | None]) -> list[PositionSquares]:
        """`of` for several networks' features of one shape and type, whose products use the device better together.

        means: for each network, None or a float64 tensor [n, >= C] whose first columns become the spatial means, from the same read of the
        features. That is possible up to `MEAN_POSITIONS` positions.
        """
        n, channels, positions = features[0].shape
        check(features[0].dtype in _TYPES, "features must be float32, float16 or bfloat16")
        check(all(each.shape == features[0].shape and each.dtype == features[0].dtype for each in features), "features must be alike")
        check(channels * positions < _ELEMENTS, f"an image must have fewer than {_ELEMENTS} elements")
        check(positions <= MEAN_POSITIONS or all(each is None for each in means), "means must be those of few positions")
        features = [each.contiguous() for each in features]
        rows = torch.empty(len(features), positions, n, channels, dtype=torch.float32, device=features[0].device)
        for each, own, mean in zip(features, rows, means, strict=True):
            _bring_into_rows(each, own, mean)
        if _strip(n, positions) < n:
            return [cls._in_strips(each, own) for each, own in zip(features, rows, strict=True)]
        products = _products(rows.flatten(0, 1), rows.flatten(0, 1)).unflatten(0, (-1, positions))
        norms = products.diagonal(dim1=2, dim2=3).contiguous()  # rounded like the other products
        results = []
        for each, product, norm, total in zip(features, products, norms, norms.sum(1), strict=True):
            distances = torch.empty(n, n, dtype=torch.float64, device=each.device)
            results.append(cls(each, None, _squares(each, product, norm, total, 0, distances), distances))
        return results

    @classmethod
    def _in_strips(cls, features: Tensor, rows: Tensor) -> PositionSquares:
        flat = geometry.wide(features.flatten(1))
        return cls(features, rows, None, fused.distances(flat - flat.mean(0)).double())

    def shares(self, matrices: Tensor, contexts: Sequence[slice]) -> Tensor:
        n, _, positions = self.features.shape
        check(matrices.ndim == 3 and matrices.shape[1:] == (n, n) and matrices.dtype == torch.float64, "matrices must be float64 [m, n, n]")
        result = matrices.new_empty(len(contexts), len(matrices), n, positions)
        bounds = _bounds(tuple(part.indices(n) for part in contexts), matrices.device)
        inputs = (matrices.contiguous(), self.distances, bounds)
        if self.squares is not None:
            _contract(self.squares, inputs, result, 0)
            return result
        assert self.rows is not None
        norms = torch.linalg.vector_norm(self.rows, dim=2).square_()
        totals, first = norms.sum(0), 0
        while first < n:
            strip = _strip(n - first, positions)
            products = _products(self.rows[:, first : first + strip], self.rows[:, first:])
            _contract(_squares(self.features, products, norms, totals, first, None), inputs, result, first)
            first += strip
        return result


def _bring_into_rows(features: Tensor, rows: Tensor, means: Tensor | None) -> None:
    """Features [n, C, P] minus their centre as rows [P, n, C], and the spatial means if requested.

    The centre is the mean of some images. Any centre near the images preserves their differences, with equally little rounding.
    """
    n, channels, positions = features.shape
    centre = features[:: max(1, n // _SAMPLED)].mean(0, dtype=torch.float32).T.contiguous()
    grid = (n * -(-channels // _CHANNELS), -(-positions // MEAN_POSITIONS), 1)
    columns = 0 if means is None else means.shape[1]
    inputs = (features, centre, n, channels, positions, columns)
    launch(features, "shares", f"shares_rows_{_TYPES[features.dtype]}", grid, *inputs, rows, means)


def _products(rows: Tensor, others: Tensor) -> Tensor:
    """The products of rows [P, q, C] and others [P, m, C] at every position, in full float32."""
    with ieee_float32():
        return torch.bmm(rows, others.mT)


@cache
def _bounds(contexts: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """The start, stop and step [contexts, 3] of each context. They are never freed, since a CUDA graph may read them."""
    return torch.tensor(contexts, dtype=torch.int32, device=device)


def _squares(features: Tensor, products: Tensor, norms: Tensor, totals: Tensor, first: int, distances: Tensor | None) -> Tensor:
    """|F_i(p) - F_j(p)|^2 [strip, count, P] of the strip's images i before all others, with their ``distances`` if requested.

    products [P, strip, count]: the products of the strip, which begins at the image ``first``, with all images from there on. norms [P, n]:
    |F_i(p)|^2. totals [n]: their sums.
    """
    n, channels, positions = features.shape
    _, strip, count = products.shape
    squares = torch.empty(strip, count, positions, dtype=torch.float32, device=features.device)
    sizes = (n, first, count, channels, positions)
    grid = (strip, -(-count // _WARP), 1)
    inputs = (products, features, norms, totals)
    launch(features, "shares", f"shares_squares_{_TYPES[features.dtype]}", grid, *inputs, fused.near(), *sizes, squares, distances)
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
