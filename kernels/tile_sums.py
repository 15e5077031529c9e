"""Sums over tiles of distance matrices, and what follows from them: inner products, influences, permutations and classes.

`kdx.kernels.tiles` computes the tiles and explains the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels import geometry, moments
from kdx.kernels.moments import Influences, Moments
from kdx.kernels.one_against_rest import ClassSums
from kdx.kernels.pair_sums import Division, PairSums


@dataclass(frozen=True)
class Swept:
    """The inner products of k matrices, normalised as in `geometry.products`.

    products [k, k]; influences: of random parts of the images on these products; permuted: maps the number of a permuted matrix to its
    products [p, k] with the other matrices (its norm does not change, and is not computed again). order: the images in tiles, in which
    every permutation turns a tile by a number of places. turns [tiles, p]: these numbers. rows [k, n]: the sums of the distances of each
    image. classes: the sums from which the products with one class against the rest follow; None unless classes were given.
    """

    products: Tensor
    influences: Influences
    permuted: dict[int, Tensor]
    order: list[Tensor]
    turns: list[Tensor]
    rows: Tensor
    classes: ClassSums | None = None

    @property
    def moments(self) -> Moments:
        """The moments of the products."""
        return self.influences.moments()


class TileSums:
    """Sums over tiles that are added one at a time, or over several tiles. classes [n]: the class of each image, if `Swept.classes` is
    wanted."""

    def __init__(
        self,
        tiles: Sequence[Tensor],
        division: Division,
        k: int,
        permuted: Sequence[int],
        turns: Sequence[Tensor],
        classes: Tensor | None = None,
    ) -> None:
        device = tiles[0].device
        self._tiles = list(tiles)
        self._permuted, self._turns = list(permuted), turns
        self._sums = PairSums(division, k, device)
        self._codes = None if classes is None else [classes.to(device)[tile] for tile in tiles]
        self._inside = None if classes is None else torch.zeros_like(self._sums.rows)
        self._turned = torch.zeros(len(self._permuted), k, len(turns[0]), dtype=torch.float64, device=device)

    def add(self, a: int, b: int, d: Tensor) -> None:
        """Add the tile d [k, l, r] of every matrix, in row a and column b >= a of tiles."""
        self._sums.add(a, b, d)
        if self._codes is not None and self._inside is not None:
            self._sums.add_rows(self._inside, a, b, d * (self._codes[a][:, None] == self._codes[b]))
        if self._turned.numel():
            self._turned += self._turned_tile(a, b, d) * (1 if a == b else 2)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The sums so far, which `add_sums` adds to those of other tiles. They share memory with this object."""
        return (self._sums.pairs, self._sums.rows, self._turned, *([] if self._inside is None else [self._inside]))

    def add_sums(self, sums: Sequence[Tensor]) -> None:
        """Add the sums of other tiles of the same matrices."""
        for own, other in zip(self.sums, sums, strict=True):
            own += other

    def _turned_tile(self, a: int, b: int, d: Tensor) -> Tensor:
        """sum_ij D_ij E_(i+s)(j+t) [permuted, k, p] for each permutation's turns s and t of two tiles; 0 for a matrix with itself."""
        place = self._turns[a] * d.shape[2] + self._turns[b]
        spectra = torch.fft.rfft2(d)
        sums = torch.zeros(len(self._permuted), len(d), len(place), device=d.device, dtype=d.dtype)
        for m, matrix in enumerate(self._permuted):
            for i in (other for other in range(len(d)) if other != matrix):
                sums[m, i] = torch.fft.irfft2(spectra[i].conj() * spectra[matrix], s=d.shape[1:]).flatten()[place]
        return sums

    def combined(self, biased: bool, offsets: Tensor) -> Swept:
        """The inner products from the sums. offsets [k, n]: what was subtracted from the rows and columns of each matrix."""
        _, rows = self._sums.totals
        n, totals = rows.shape[1], rows.sum(1)
        permuted = {
            matrix: geometry.combined(turned.T, self._turned_rows(rows, matrix), totals * totals[matrix], n, biased)
            for matrix, turned in zip(self._permuted, self._turned, strict=True)
        }
        # With the subtracted u_i + u_j (i != j), a row sums to (n - 2) u_i + sum_j u_j more.
        shifted = offsets[:, torch.cat(self._tiles)]
        sums = rows + (n - 2) * shifted + shifted.sum(1, keepdim=True)
        influences = moments.influences(self._sums.pairs, self._sums.rows, self._sums.division.sizes, biased)
        return Swept(self._sums.products(biased), influences, permuted, self._tiles, list(self._turns), sums, self._class_sums())

    def _class_sums(self) -> ClassSums | None:
        if self._codes is None or self._inside is None:
            return None
        return ClassSums.of_rows(self._sums.rows, self._inside, torch.cat(self._codes), self._sums.division.sizes)

    def _turned_rows(self, rows: Tensor, matrix: int) -> Tensor:
        """sum_i r_i s_pi(i) [p, k] of the row sums [k, n] and the permuted row sums of ``matrix``."""
        products = rows.new_zeros(len(self._turns[0]), len(rows))
        for place, turns in zip(self._sums.division.places, self._turns, strict=True):
            spectra = torch.fft.rfft(rows[:, place])
            products += torch.fft.irfft(spectra.conj() * spectra[matrix], n=place.stop - place.start)[:, turns].T
        return products
