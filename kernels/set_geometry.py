"""The geometry of N images after the first sweep: every entry of a U-centred matrix, tile by tile.

`kdx.kernels.tiles.Sweep` sums over all pairs, and its results are inner products and row sums. With them, an entry of a U-centred matrix
is known from its distance. The distances themselves are kept by the first sweep, on disk if necessary, so that no Gram product of whole
images is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kdx.kernels.tiles import TILE, FeatureDistances, Matrix, Swept, tile_side


class StoredDistances:
    """The distances between features, as tiles of the upper triangle in the order of the first sweep.

    They have the type of the features, float32 at least. allocate: returns an array of a shape and type for the matrix of a number; by
    default it is in memory. Distances between classes are not stored.
    """

    def __init__(self, matrices: Sequence[Matrix], allocate: Callable[[int, tuple[int, ...], torch.dtype], Tensor] | None = None) -> None:
        measured = {number: m for number, m in enumerate(matrices) if isinstance(m, FeatureDistances)}
        n = next(iter(measured.values())).rows.shape[0]
        self._matrices = measured
        self._side = tile_side(n, [m.rows for m in measured.values()])
        self._count = -(-n // self._side)
        shape = self._count * (self._count + 1) // 2, self._side, self._side
        self._tiles: dict[int, Tensor] = {}
        for number, matrix in measured.items():
            dtype = torch.promote_types(matrix.rows.dtype, torch.float32)
            if allocate is None:
                self._tiles[number] = torch.empty(shape, dtype=dtype, device=matrix.rows.device)
            else:
                self._tiles[number] = allocate(number, shape, dtype)

    @staticmethod
    def bytes(n: int, matrices: int) -> int:
        """At most the size of the distances of n images between the float32 features of this many networks."""
        side = min(TILE, max(n, 16))
        count = -(-n // side)
        return 2 * matrices * count * (count + 1) * side**2

    def keep(self, a: int, b: int, d: Tensor) -> None:
        """Store the tile (a, b) of every matrix, d [k, l, r]; the ``keep`` of `sweep`."""
        for matrix, tiles in self._tiles.items():
            tiles[self._number(a, b), : d.shape[1], : d.shape[2]] = d[matrix]

    def tile(self, matrix: int, a: int, b: int, rows: int, columns: int) -> Tensor:
        """The distances [rows, columns] of the tile (a, b), a <= b, in float64."""
        tile = self._tiles[matrix][self._number(a, b), :rows, :columns]
        return tile.to(self._matrices[matrix].rows.device, torch.float64)

    def _number(self, a: int, b: int) -> int:
        return a * self._count - a * (a - 1) // 2 + b - a


@dataclass(frozen=True, eq=False)
class SetGeometry:
    """k matrices of n images, what the first sweep computed of them, and their distances."""

    matrices: Sequence[Matrix]
    swept: Swept
    stored: StoredDistances

    @cached_property
    def order(self) -> Tensor:
        """The images [n] in the order of the tiles, which is the order of everything here."""
        return torch.cat(self.swept.order)

    @cached_property
    def places(self) -> list[slice]:
        """The place of each tile in this order."""
        ends = np.cumsum([len(tile) for tile in self.swept.order])
        return [slice(int(end) - len(tile), int(end)) for tile, end in zip(self.swept.order, ends, strict=True)]

    @property
    def n(self) -> int:
        return len(self.order)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The tiles of the upper triangle."""
        return [(a, b) for a in range(len(self.places)) for b in range(a, len(self.places))]

    def distances(self, matrix: int, a: int, b: int) -> Tensor:
        """The distances [l, r] of the tile (a, b), in float64. Those below the diagonal are the transpose of another tile."""
        if a > b:
            return self.distances(matrix, b, a).T
        rows, columns = self.swept.order[a], self.swept.order[b]
        source = self.matrices[matrix]
        if isinstance(source, FeatureDistances):
            return self.stored.tile(matrix, a, b, len(rows), len(columns))
        return source.tile(rows, columns)

    def centred(self, matrix: int, a: int, b: int) -> Tensor:
        """The tile [l, r] of the U-centred matrix; zero on the diagonal."""
        shift = self._shifts[matrix]
        tile = self.distances(matrix, a, b) - shift[self.places[a], None] - shift[self.places[b]]
        return tile.fill_diagonal_(0) if a == b else tile

    def turned(self, matrix: int, a: int, b: int, permutation: int) -> Tensor:
        """The tile of the U-centred matrix under a permutation of its images: one of those of the first sweep."""
        left, right = (int(self.swept.turns[tile][permutation]) for tile in (a, b))
        return self.centred(matrix, a, b).roll((-left, -right), (0, 1))

    @cached_property
    def _shifts(self) -> Tensor:
        """s [k, n] with A_ij = D_ij - s_i - s_j for i != j."""
        rows, n = self.swept.rows, self.n
        return rows / (n - 2) - rows.sum(1, keepdim=True) / (2 * (n - 1) * (n - 2))
