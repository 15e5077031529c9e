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
    """Sums over tiles that are added one at a time. classes [n]: the class of each image, if `Swept.classes` is wanted."""

    def __init__(
        self, tiles: Sequence[Tensor], k: int, permuted: Sequence[int], turns: Sequence[Tensor], classes: Tensor | None = None
    ) -> None:
        n, device = sum(map(len, tiles)), tiles[0].device
        self._tiles = list(tiles)
        self._permuted, self._turns = list(permuted), turns
        self._places = [slice(start, start + len(part)) for start, part in zip(range(0, n, len(tiles[0])), tiles, strict=True)]
        # The images are in random order, so consecutive parts are random parts.
        self._sizes = moments.part_sizes(n)
        starts = [sum(self._sizes[:part]) for part in range(len(self._sizes))]
        self._bounds = [slice(start, start + size) for start, size in zip(starts, self._sizes, strict=True)]
        self._parts = [self._within(place) for place in self._places]
        self._pairs = torch.zeros(k, k, len(starts), len(starts), dtype=torch.float64, device=device)
        self._rows = torch.zeros(k, n, len(starts), dtype=torch.float64, device=device)
        self._codes = None if classes is None else [classes.to(device)[tile] for tile in tiles]
        self._inside = None if classes is None else torch.zeros_like(self._rows)
        self._turned = torch.zeros(len(self._permuted), k, len(turns[0]), dtype=torch.float64, device=device)

    def add(self, a: int, b: int, d: Tensor) -> None:
        """Add the tile d [k, l, r] of every matrix, in row a and column b >= a of tiles."""
        left, right = self._parts[a], self._parts[b]
        self._add_rows(self._rows, a, b, d)
        if self._codes is not None and self._inside is not None:
            self._add_rows(self._inside, a, b, d * (self._codes[a][:, None] == self._codes[b]))
        for i in range(len(d)):
            for j in range(i, len(d)):
                product = d[i] * d[j]
                columns = torch.stack([product[:, place].sum(1) for place in right.values()])
                split = torch.stack([columns[:, place].sum(1) for place in left.values()])
                self._add_pairs(i, j, list(left), list(right), split)
                if a != b:
                    self._add_pairs(i, j, list(right), list(left), split.T)
        if self._turned.numel():
            self._turned += self._turned_tile(a, b, d) * (1 if a == b else 2)

    def _add_rows(self, rows: Tensor, a: int, b: int, d: Tensor) -> None:
        """Add the row sums of a tile [k, l, r] to ``rows`` [k, n, u], split by the parts of the columns."""
        for part, place in self._parts[b].items():
            rows[:, self._places[a], part] += d[:, :, place].sum(2)
        if a != b:
            for part, place in self._parts[a].items():
                rows[:, self._places[b], part] += d[:, place].sum(1)

    def _within(self, place: slice) -> dict[int, slice]:
        """The parts that have images at ``place``, and their positions in it."""
        cut = {part: slice(max(b.start, place.start), min(b.stop, place.stop)) for part, b in enumerate(self._bounds)}
        return {part: slice(b.start - place.start, b.stop - place.start) for part, b in cut.items() if b.start < b.stop}

    def _add_pairs(self, i: int, j: int, left: list[int], right: list[int], sums: Tensor) -> None:
        """Add the sums [l, r] of D_i D_j over pairs of images of these parts."""
        for first, second in {(i, j), (j, i)}:
            self._pairs[first, second, left[0] : left[-1] + 1, right[0] : right[-1] + 1] += sums

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
        rows, n = self._rows.sum(2), self._rows.shape[1]
        pairs, totals = self._pairs.sum((2, 3)), rows.sum(1)
        products = geometry.combined(pairs, rows @ rows.T, totals[:, None] * totals, n, biased)
        permuted = {
            matrix: geometry.combined(turned.T, self._turned_rows(rows, matrix), totals * totals[matrix], n, biased)
            for matrix, turned in zip(self._permuted, self._turned, strict=True)
        }
        # With the subtracted u_i + u_j (i != j), a row sums to (n - 2) u_i + sum_j u_j more.
        shifted = offsets[:, torch.cat(self._tiles)]
        sums = rows + (n - 2) * shifted + shifted.sum(1, keepdim=True)
        influences = moments.influences(self._pairs, self._rows, self._sizes, biased)
        return Swept(products, influences, permuted, self._tiles, list(self._turns), sums, self._class_sums())

    def _class_sums(self) -> ClassSums | None:
        if self._codes is None or self._inside is None:
            return None
        return ClassSums.of_rows(self._rows, self._inside, torch.cat(self._codes), self._sizes)

    def _turned_rows(self, rows: Tensor, matrix: int) -> Tensor:
        """sum_i r_i s_pi(i) [p, k] of the row sums [k, n] and the permuted row sums of ``matrix``."""
        products = rows.new_zeros(len(self._turns[0]), len(rows))
        for place, turns in zip(self._places, self._turns, strict=True):
            spectra = torch.fft.rfft(rows[:, place])
            products += torch.fft.irfft(spectra.conj() * spectra[matrix], n=place.stop - place.start)[:, turns].T
        return products
