"""Sums over all pairs of images, of the products of k matrices, added tile by tile.

The inner products of the centred matrices and their moments follow from them (`kdx.kernels.geometry.combined`,
`kdx.kernels.moments`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdx.kernels import geometry, moments


class PairSums:
    """Sums over the pairs of n images of k symmetric matrices D, split by equal parts of the images.

    tiles: the images in random order, so that consecutive parts are random parts. parts: the number of parts, by default
    `moments.PARTS`; 1 where no moments are needed.

    pairs [k, k, u, u]: sum of D_ij E_ij over the images i of one part and j of the other, for every two matrices D and E. rows [k, n, u]:
    sum_j D_ij over the images j of each part, with the images in the order of the tiles. sizes [u]: the images of each part.
    """

    def __init__(self, tiles: Sequence[Tensor], k: int, parts: int | None = None) -> None:
        n, device = sum(map(len, tiles)), tiles[0].device
        self.places = [slice(start, start + len(part)) for start, part in zip(range(0, n, len(tiles[0])), tiles, strict=True)]
        self.sizes = moments.part_sizes(n, parts)
        starts = [sum(self.sizes[:part]) for part in range(len(self.sizes))]
        self._bounds = [slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True)]
        self._parts = [self._within(place) for place in self.places]
        self.pairs = torch.zeros(k, k, len(starts), len(starts), dtype=torch.float64, device=device)
        self.rows = torch.zeros(k, n, len(starts), dtype=torch.float64, device=device)

    def add(self, a: int, b: int, d: Tensor) -> None:
        """Add the tile d [k, l, r] of every matrix, in row a and column b >= a of tiles. Its entries are float64."""
        left, right = self._parts[a], self._parts[b]
        self.add_rows(self.rows, a, b, d)
        blocks = (d[:, rows, columns].flatten(1) for rows in left.values() for columns in right.values())
        products = torch.stack([block @ block.T for block in blocks]).unflatten(0, (len(left), len(right))).permute(2, 3, 0, 1)
        first, second = (slice(min(parts), max(parts) + 1) for parts in (left, right))
        self.pairs[:, :, first, second] += products
        if a != b:
            self.pairs[:, :, second, first] += products.mT

    def add_rows(self, rows: Tensor, a: int, b: int, d: Tensor) -> None:
        """Add the row sums of a tile [k, l, r] to ``rows`` [k, n, u], split by the parts of the columns."""
        for part, place in self._parts[b].items():
            rows[:, self.places[a], part] += d[:, :, place].sum(2)
        if a != b:
            for part, place in self._parts[a].items():
                rows[:, self.places[b], part] += d[:, place].sum(1)

    @property
    def totals(self) -> tuple[Tensor, Tensor]:
        """The sums of the products of every two matrices [k, k] over all pairs of images, and the sums of the rows [k, n]."""
        return self.pairs.sum((2, 3)), self.rows.sum(2)

    def products(self, biased: bool = False) -> Tensor:
        """The inner products [k, k] of the centred matrices."""
        pairs, rows = self.totals
        sums = rows.sum(1)
        return geometry.combined(pairs, rows @ rows.T, sums[:, None] * sums, rows.shape[1], biased)

    def _within(self, place: slice) -> dict[int, slice]:
        """The parts that have images at ``place``, and their positions in it."""
        cut = {part: slice(max(b.start, place.start), min(b.stop, place.stop)) for part, b in enumerate(self._bounds)}
        return {part: slice(b.start - place.start, b.stop - place.start) for part, b in cut.items() if b.start < b.stop}
