"""Sums over all pairs of images, of the products of k matrices, added tile by tile.

The inner products of the centred matrices and their moments follow from them (`kdx.kernels.geometry.combined`,
`kdx.kernels.moments`).
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def add(self, a: int, b: int, d: Tensor) -> None:
        """Add the tile d [k, l, r] of every matrix, in row a and column b >= a of tiles. Its entries are float64."""
        left, right = self.division.parts[a], self.division.parts[b]
        self.add_rows(self.rows, a, b, d)
        blocks = (d[:, rows, columns].flatten(1) for rows in left.values() for columns in right.values())
        products = torch.stack([block @ block.T for block in blocks]).unflatten(0, (len(left), len(right))).permute(2, 3, 0, 1)
        first, second = (slice(min(parts), max(parts) + 1) for parts in (left, right))
        self.pairs[:, :, first, second] += products
        if a != b:
            self.pairs[:, :, second, first] += products.mT

    def add_rows(self, rows: Tensor, a: int, b: int, d: Tensor) -> None:
        """Add the row sums of a tile [k, l, r] to ``rows`` [k, n, u], split by the parts of the columns."""
        for part, place in self.division.parts[b].items():
            rows[:, self.division.places[a], part] += d[:, :, place].sum(2)
        if a != b:
            for part, place in self.division.parts[a].items():
                rows[:, self.division.places[b], part] += d[:, place].sum(1)

    @property
    def totals(self) -> tuple[Tensor, Tensor]:
        """The sums of the products of every two matrices [k, k] over all pairs of images, and the sums of the rows [k, n]."""
        return self.pairs.sum((2, 3)), self.rows.sum(2)

    def products(self, biased: bool = False) -> Tensor:
        """The inner products [k, k] of the centred matrices."""
        pairs, rows = self.totals
        sums = rows.sum(1)
        return geometry.combined(pairs, rows @ rows.T, sums[:, None] * sums, rows.shape[1], biased)
