"""UniCAM over N images, from strips of the distance matrices. The derivation is that of `kdx.kernels.geometry`.

The gradient with respect to the distances is a combination of U-centred matrices, whose coefficients follow from inner products over all
images:

    relevance    M = 2/||R|| (G^ - <G^,B^> B^ - L R^),             L = <R^,G^>
    uniqueness   M = U(E + E^T) - 2 (<E,B>/<B,B>) B,               L = sum_i max_j R_ij, E one at the first maximum of each row

So a strip of M costs arithmetic on strips of A, B and G. Uniqueness first needs the maxima of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.kernels.strips import SetGeometry


@dataclass(frozen=True, eq=False)
class SetGradient:
    """M = dL/dD of one explained and one given network, as a combination of the k matrices of a `SetGeometry`.

    coefficients [k]. maxima [n]: the place of the first maximum in each row of R, or None. score: L. residual_norm: ||R||.
    """

    coefficients: Tensor
    maxima: Tensor | None
    score: float
    residual_norm: float

    @classmethod
    def of(cls, geometry: SetGeometry, products: Tensor, explained: int, given: int, target: int, objective: ObjectiveName) -> SetGradient:
        """products [k, k]: those of the geometry, or those under a permutation."""
        if objective == "uniqueness":
            return _uniqueness(geometry, explained, given)
        return _relevance(products * geometry.n * (geometry.n - 3), explained, given, target)

    def strip(self, centred: Sequence[Tensor], own: slice) -> Tensor:
        """A strip [l, n] of M from the same strips of the centred matrices; ``own`` is the place of its rows."""
        parts = [c * matrix for c, matrix in zip(self.coefficients.tolist(), centred, strict=True) if c]
        result = torch.stack(parts).sum(0) if parts else torch.zeros_like(centred[0])
        if self.maxima is not None:
            result += _symmetric_maxima(self.maxima, own)
        return result


def _relevance(products: Tensor, explained: int, given: int, target: int) -> SetGradient:
    """From unnormalised inner products [k, k] of all matrices."""
    aa, bb, gg = (products[i, i] for i in (explained, given, target))
    ab, ag, bg = products[explained, given], products[explained, target], products[given, target]
    share = ab / bb
    rr = aa - share * ab
    score = (ag - share * bg) / (rr * gg).sqrt()
    # The squared norm of M/2 against its rounding: with four images, or if R points along G, only rounding remains.
    squared = (1 - bg.square() / (bb * gg) - score.square()) / rr
    rounding = (1e3 * torch.finfo(torch.float64).eps) ** 2 * aa / rr * torch.maximum(squared, 1 / rr)
    coefficients = products.new_zeros(len(products))
    if bool(squared > rounding):
        coefficients[target] += 1 / gg.sqrt()
        coefficients[given] += score * share / rr.sqrt() - bg / (bb * gg.sqrt())
        coefficients[explained] -= score / rr.sqrt()
        coefficients *= 2 / rr.sqrt()
    return SetGradient(coefficients, None, float(score), float(rr.sqrt()))


def _uniqueness(geometry: SetGeometry, explained: int, given: int) -> SetGradient:
    n, products = geometry.n, geometry.swept.products
    share = products[explained, given] / products[given, given]
    maxima = torch.empty(n, dtype=torch.int64, device=products.device)
    score, with_given = 0.0, 0.0
    for a, own in enumerate(geometry.places):
        x, y = (geometry.centred(matrix, a, geometry.distances(matrix, a)) for matrix in (explained, given))
        best, maxima[own] = (x - share * y).max(1)
        score += float(best.sum())
        with_given += float(y.gather(1, maxima[own, None]).sum())
    size = n * (n - 3)
    coefficients = products.new_zeros(len(products))
    coefficients[given] = -2 * with_given / (float(products[given, given]) * size)
    squared = (products[explained, explained] - share * products[explained, given]) * size
    return SetGradient(coefficients, maxima, score, float(squared.sqrt()))


def _symmetric_maxima(maxima: Tensor, own: slice) -> Tensor:
    """A strip [l, n] of U(E + E^T), with E one at the maximum of each row."""
    n, rows = len(maxima), maxima[own]
    strip = torch.zeros(len(rows), n, dtype=torch.float64, device=maxima.device)
    place = torch.arange(len(rows), device=maxima.device)
    strip[place, rows] += 1
    inside = ((maxima >= own.start) & (maxima < own.start + len(rows))).nonzero()[:, 0]
    strip.index_put_(
        (maxima[inside] - own.start, inside), torch.ones(len(inside), dtype=torch.float64, device=maxima.device), accumulate=True
    )
    sums = 1 + torch.bincount(maxima, minlength=n).double()
    shift = sums / (n - 2) - n / ((n - 1) * (n - 2))
    strip -= shift[own, None] + shift
    strip[:, own].fill_diagonal_(0)
    return strip


def channel_weights(weights: Tensor, means: Tensor, own: slice, halves: Sequence[Sequence[slice]]) -> Tensor:
    """sum_j W_ij (f_i - f_j) [halves, l, C] over the images j of each half, for a strip W [l, n] and the spatial means f [n, C]."""
    result = []
    for places in halves:
        part = slice(places[0].start, places[-1].stop)
        inside = weights[:, part]
        result.append(inside.sum(1, keepdim=True) * means[own] - inside @ means[part])
    return torch.stack(result)
