"""UniCAM over N images, from tiles of the distance matrices. The derivation is that of `kdx.kernels.geometry`.

The gradient with respect to the distances is a combination of U-centred matrices, whose coefficients follow from inner products over all
images:

    relevance    M = 2/||R|| (G^ - <G^,B^> B^ - L R^),             L = <R^,G^>
    uniqueness   M = U(E + E^T) - 2 (<E,B>/<B,B>) B,               L = sum_i max_j R_ij, E one at the first maximum of each row

Given nothing, R = A, and the terms with B are absent.

So a tile of M costs arithmetic on tiles of A, B and G. Uniqueness first needs the maxima of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.kernels.set_geometry import SetGeometry


@dataclass(frozen=True, eq=False)
class SetGradient:
    """M = dL/dD of one explained network given another or given nothing, as a combination of the k matrices of a `SetGeometry`.

    coefficients [k]. maxima [n]: the place of the first maximum in each row of R, or None. score: L. residual_norm: ||R||.
    """

    coefficients: Tensor
    maxima: Tensor | None
    score: float
    residual_norm: float

    @classmethod
    def of(
        cls, geometry: SetGeometry, products: Tensor, explained: int, given: int | None, target: int, objective: ObjectiveName
    ) -> SetGradient:
        """products [k, k]: those of the geometry, or those under a permutation. given: None for given nothing."""
        if objective == "uniqueness":
            return _uniqueness(geometry, explained, given)
        return _relevance(products * geometry.n * (geometry.n - 3), explained, given, target)

    def tile(self, centred: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
        """A tile [l, r] of M from the same tile of every centred matrix; ``rows`` and ``columns`` are its places."""
        result = torch.zeros_like(centred[0])
        for coefficient, matrix in zip(self.coefficients.tolist(), centred, strict=True):
            if coefficient:
                result.add_(matrix, alpha=coefficient)
        if self.maxima is not None:
            result += _symmetric_maxima(self.maxima, rows, columns)
        return result


def _relevance(products: Tensor, explained: int, given: int | None, target: int) -> SetGradient:
    """From unnormalised inner products [k, k] of all matrices."""
    aa, ag, gg = products[explained, explained], products[explained, target], products[target, target]
    ab = bg = products.new_zeros(())
    bb = products.new_ones(())  # given nothing, R = A: the inner products with B are 0
    if given is not None:
        bb, ab, bg = products[given, given], products[explained, given], products[given, target]
    share = ab / bb
    rr = aa - share * ab
    score = (ag - share * bg) / (rr * gg).sqrt()
    # |M|^2 times rr/4, a difference: with four images, or if R points along G, only its rounding remains.
    left = 1 - bg.square() / (bb * gg) - score.square()
    rounding = 64 * torch.finfo(torch.float64).eps * aa / rr
    coefficients = products.new_zeros(len(products))
    if bool(left > rounding):
        coefficients[target] += 1 / gg.sqrt()
        if given is not None:
            coefficients[given] += score * share / rr.sqrt() - bg / (bb * gg.sqrt())
        coefficients[explained] -= score / rr.sqrt()
        coefficients *= 2 / rr.sqrt()
    return SetGradient(coefficients, None, float(score), float(rr.sqrt()))


def _uniqueness(geometry: SetGeometry, explained: int, given: int | None) -> SetGradient:
    n, products = geometry.n, geometry.swept.products
    share = products.new_zeros(()) if given is None else products[explained, given] / products[given, given]
    maxima = torch.zeros(n, dtype=torch.int64, device=products.device)
    best = torch.full((n,), -torch.inf, dtype=torch.float64, device=products.device)
    matching = torch.zeros(n, dtype=torch.float64, device=products.device)
    for a, b in geometry.pairs:
        x, y = (geometry.centred(explained if matrix is None else matrix, a, b) for matrix in (explained, given))
        residual = x - share * y  # given nothing, the share is 0 and y has no effect
        for rows, columns, r, given_tile in ((a, b, residual, y), (b, a, residual.T, y.T))[: 1 + (a != b)]:
            own, place = geometry.places[rows], geometry.places[columns]
            largest, where = r.max(1)
            # Of equal maxima the first one counts, so that the order of the tiles does not matter.
            better = (largest > best[own]) | ((largest == best[own]) & (where + place.start < maxima[own]))
            best[own] = torch.where(better, largest, best[own])
            maxima[own] = torch.where(better, where + place.start, maxima[own])
            matching[own] = torch.where(better, given_tile.gather(1, where[:, None])[:, 0], matching[own])
    score, with_given = float(best.sum()), float(matching.sum())
    size = n * (n - 3)
    coefficients = products.new_zeros(len(products))
    squared = products[explained, explained] * size
    if given is not None:
        coefficients[given] = -2 * with_given / (float(products[given, given]) * size)
        squared = (products[explained, explained] - share * products[explained, given]) * size
    return SetGradient(coefficients, maxima, score, float(squared.sqrt()))


def _symmetric_maxima(maxima: Tensor, rows: slice, columns: slice) -> Tensor:
    """A tile [l, r] of U(E + E^T), with E one at the maximum of each row."""
    n = len(maxima)
    sums = 1 + torch.bincount(maxima, minlength=n).double()
    shift = sums / (n - 2) - n / ((n - 1) * (n - 2))
    tile = -(shift[rows, None] + shift[columns])
    one = torch.ones((), dtype=torch.float64, device=maxima.device)
    for own, other, part in ((rows, columns, tile), (columns, rows, tile.T)):
        inside = ((maxima[own] >= other.start) & (maxima[own] < other.stop)).nonzero()[:, 0]
        part.index_put_((inside, maxima[own][inside] - other.start), one.expand(len(inside)), accumulate=True)
    if rows.start == columns.start:
        tile.fill_diagonal_(0)
    return tile
