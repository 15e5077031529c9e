"""Sums over all pairs of images, of the products of k matrices, added tile by tile.

The inner products of the centred matrices and their moments follow from them (`kdx.kernels.geometry.combined`,
`kdx.kernels.moments`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kdx.kernels import geometry, moments


@dataclass(frozen=True)
class Division:
    """Where the images of each tile are, and the equal parts of the images whose sums are kept apart.

    places: of the images of each tile, in the order of the tiles. sizes [u]: the images of each part. parts: per tile, the parts that have
    images in it, and their positions in it.
    """

    places: list[slice]
    sizes: list[int]
    parts: list[dict[int, slice]]

    @classmethod
    def of(cls, tiles: Sequence[Tensor], parts: int | None = None) -> Division:
        """tiles: the images in random order, so that consecutive parts are random parts. parts: as for `moments.part_sizes`; 1 where no
        moments are needed."""
        ends = list(accumulate(map(len, tiles), initial=0))
        places = [slice(*bounds) for bounds in pairwise(ends)]
        sizes = moments.part_sizes(ends[-1], parts)
        bounds = list(accumulate(sizes, initial=0))
        return cls(places, sizes, [_within(bounds, place) for place in places])


def _within(bounds: Sequence[int], place: slice) -> dict[int, slice]:
    """The parts between ``bounds`` that have images at ``place``, and their positions in it."""
    cut = ((max(start, place.start), min(stop, place.stop)) for start, stop in pairwise(bounds))
    return {part: slice(start - place.start, stop - place.start) for part, (start, stop) in enumerate(cut) if start < stop}


def part_products(d: Tensor, left: Mapping[int, slice], right: Mapping[int, slice]) -> Tensor:
    """The sums [k, k, L, R] of D_ij E_ij over the images i of each part in ``left`` and j of each in ``right``, from a tile d [k, l, r].

    Every block is small enough for a processor's cache.
    """
    blocks = (d[:, rows, columns].flatten(1) for rows in left.values() for columns in right.values())
    products: Tensor = torch.stack([block @ block.T for block in blocks]).unflatten(0, (len(left), len(right)))
    return products.permute(2, 3, 0, 1)


def indicated_products(d: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`part_products` from indicators [l, L] and [r, R] of the parts: few large operations, as a GPU needs them."""
    result = d.new_empty(len(d), len(d), left.shape[1], right.shape[1])
    for matrix in range(len(d)):
        result[matrix, matrix:] = result[matrix:, matrix] = left.T @ (d[matrix:] * d[matrix]) @ right
    return result


def indicator(parts: Mapping[int, slice]) -> Tensor:
    """1 where an image of a tile is in a part, else 0: [l, parts], for consecutive parts."""
    places = list(parts.values())
    result = torch.zeros(places[-1].stop, len(places))
    for number, place in enumerate(places):
        result[place, number] = 1
    return result


def _span(parts: Mapping[int, slice]) -> slice:
    return slice(min(parts), max(parts) + 1)


class PairSums:
    """Sums over the pairs of n images of k symmetric matrices D, split by the parts of a `Division`.

    pairs [k, k, u, u]: sum of D_ij E_ij over the images i of one part and j of the other, for every two matrices D and E. rows [k, n, u]:
    sum_j D_ij over the images j of each part, with the images in the order of the tiles.
    """

    def __init__(self, division: Division, k: int, device: torch.device | None = None) -> None:
        self.division = division
        count = len(division.sizes)
        self.pairs = torch.zeros(k, k, count, count, dtype=torch.float64, device=device)
        self.rows = torch.zeros(k, division.places[-1].stop, count, dtype=torch.float64, device=device)
        self._indicators: dict[int, Tensor] = {}

    def add(self, a: int, b: int, d: Tensor) -> None:
        """Add the tile d [k, l, r] of every matrix, in row a and column b >= a of tiles. Its entries are float64."""
        left, right = self.division.parts[a], self.division.parts[b]
        self.add_rows(self.rows, a, b, d)
        if d.device.type == "cpu":
            products = part_products(d, left, right)
        else:
            products = indicated_products(d, self._indicator(a, d), self._indicator(b, d))
        first, second = _span(left), _span(right)
        self.pairs[:, :, first, second] += products
        if a != b:
            self.pairs[:, :, second, first] += products.mT

    def add_rows(self, rows: Tensor, a: int, b: int, d: Tensor) -> None:
        """Add the row sums of a tile [k, l, r] to ``rows`` [k, n, u], split by the parts of the columns."""
        for tile, other, values in ((a, b, d), (b, a, d.mT))[: 1 + (a != b)]:
            parts, own = self.division.parts[other], rows[:, self.division.places[tile]]
            if d.device.type != "cpu":
                own[:, :, _span(parts)] += values @ self._indicator(other, d)
                continue
            for part, place in parts.items():
                own[:, :, part] += values[:, :, place].sum(2)

    def _indicator(self, tile: int, like: Tensor) -> Tensor:
        """1 where an image of a tile is in a part, else 0: [l, parts of the tile]."""
        if tile not in self._indicators:
            self._indicators[tile] = indicator(self.division.parts[tile]).to(like)
        return self._indicators[tile]

    @property
    def totals(self) -> tuple[Tensor, Tensor]:
        """The sums of the products of every two matrices [k, k] over all pairs of images, and the sums of the rows [k, n]."""
        return self.pairs.sum((2, 3)), self.rows.sum(2)

    def products(self, biased: bool = False) -> Tensor:
        """The inner products [k, k] of the centred matrices."""
        pairs, rows = self.totals
        sums = rows.sum(1)
        return geometry.combined(pairs, rows @ rows.T, sums[:, None] * sums, rows.shape[1], biased)
