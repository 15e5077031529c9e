"""The second sweep over N images: what maps need of all pairs, in strips of the distance matrices, with O(N x tile) memory.

`kernels.tiles.sweep` sums over all pairs, and its results are inner products. With them every entry of a U-centred matrix, and of a
combination of such matrices, is known from its distance, its two row sums and the total. A strip contains the rows of one tile of images
and the columns of all images, in the order of the tiles. The distances themselves are kept by the first sweep, on disk if necessary, so
that no Gram product is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdx.kernels import decomposition, geometry
from kdx.kernels.decomposition import PairWeights
from kdx.kernels.tiles import FeatureDistances, Matrix, Swept, tile_side


class StoredDistances:
    """The distances between features, as tiles of the upper triangle in the order of the first sweep.

    They have the type of the features, float32 at least. They are in memory, or in files under ``folder``, which the caller deletes.
    """

    def __init__(self, matrices: Sequence[Matrix], folder: Path | None = None) -> None:
        self._matrices = list(matrices)
        measured = [m for m in matrices if isinstance(m, FeatureDistances)]
        n = measured[0].rows.shape[0]
        self._side = tile_side(n, [m.rows for m in measured])
        self._count = -(-n // self._side)
        self._tiles: list[Tensor | None] = []
        shape = self._count * (self._count + 1) // 2, self._side, self._side
        for number, matrix in enumerate(matrices):
            if not isinstance(matrix, FeatureDistances):
                self._tiles.append(None)
                continue
            dtype = torch.promote_types(matrix.rows.dtype, torch.float32)
            if folder is None:
                self._tiles.append(torch.empty(shape, dtype=dtype, device=matrix.rows.device))
            else:
                file = np.lib.format.open_memmap(
                    folder / f"distances-{number}.npy", "w+", {torch.float32: "<f4", torch.float64: "<f8"}[dtype], shape
                )
                self._tiles.append(torch.from_numpy(file))

    @staticmethod
    def bytes(n: int, matrices: int) -> int:
        """The size of the distances of n images between the float32 features of this many networks."""
        return matrices * 4 * n * (n + 1024) // 2

    def keep(self, a: int, b: int, d: Tensor) -> None:
        """Store the tile (a, b) of every matrix, d [k, l, r]; the ``keep`` of `sweep`."""
        for tiles, tile in zip(self._tiles, d, strict=True):
            if tiles is not None:
                tiles[self._number(a, b), : tile.shape[0], : tile.shape[1]] = tile

    def strip(self, matrix: int, a: int, order: Sequence[Tensor]) -> Tensor:
        """The distances [l, n] in float64 of the images of tile a from all images, in the given order of tiles."""
        tiles, source = self._tiles[matrix], self._matrices[matrix]
        if tiles is None:
            assert not isinstance(source, FeatureDistances)
            return source.tile(order[a], torch.cat(list(order)))
        rows = len(order[a])
        parts = [
            tiles[self._number(a, b)][:rows, : len(other)] if a <= b else tiles[self._number(b, a)][: len(other), :rows].T
            for b, other in enumerate(order)
        ]
        return torch.cat(parts, 1).double()

    def _number(self, a: int, b: int) -> int:
        return a * self._count - a * (a - 1) // 2 + b - a


@dataclass(frozen=True, eq=False)
class SetGeometry:
    """The geometry of n images after the first sweep: k matrices, their inner products, and their distances."""

    matrices: Sequence[Matrix]
    swept: Swept
    stored: StoredDistances

    @cached_property
    def order(self) -> Tensor:
        """The images [n] in the order of the tiles, which is the order of rows and columns here."""
        return torch.cat(self.swept.order)

    @cached_property
    def places(self) -> list[slice]:
        """The place of each tile in this order."""
        ends = np.cumsum([len(tile) for tile in self.swept.order])
        return [slice(int(end) - len(tile), int(end)) for tile, end in zip(self.swept.order, ends, strict=True)]

    @property
    def n(self) -> int:
        return len(self.order)

    def distances(self, matrix: int, a: int) -> Tensor:
        """Strip a [l, n] of the distances of a matrix, in float64."""
        return self.stored.strip(matrix, a, self.swept.order)

    def centred(self, matrix: int, a: int, distances: Tensor) -> Tensor:
        """Strip a of the U-centred matrix, from the strip of its distances."""
        return _centred(distances, self.swept.rows[matrix], self.places[a])

    def turned(self, matrix: int, a: int, permutation: int) -> Tensor:
        """Strip a of the U-centred matrix under a permutation of its images: one of those of the first sweep."""
        turns = [int(turn[permutation]) for turn in self.swept.turns]
        centred = self.centred(matrix, a, self.distances(matrix, a))
        return torch.cat([centred[:, place].roll((-turns[a], -turn), (0, 1)) for place, turn in zip(self.places, turns, strict=True)], 1)


def _centred(distances: Tensor, rows: Tensor, own: slice) -> Tensor:
    """U-centred distances [l, n] of the images ``own`` [l], from all row sums [n]. The diagonal is zero."""
    n = len(rows)
    shift = rows / (n - 2) - rows.sum() / (2 * (n - 1) * (n - 2))
    centred = distances - shift[own, None] - shift
    centred[:, own].fill_diagonal_(0)
    return centred


@dataclass(frozen=True, eq=False)
class SetFeatures:
    """Features [n, C, P] on demand, minus one centre, in the order of a `SetGeometry`.

    shape: (C, P). norms [n, P]: |F_i(p)|^2 about the centre. means [n, C]: the spatial means about the centre. Both are float64.
    """

    matrix: FeatureDistances
    order: Tensor
    shape: tuple[int, int]
    norms: Tensor
    means: Tensor

    @classmethod
    def of(cls, matrix: FeatureDistances, geometry_: SetGeometry, channels: int) -> SetFeatures:
        positions = matrix.rows.shape[1] // channels
        shape = channels, positions
        norms = torch.empty(geometry_.n, positions, dtype=torch.float64, device=matrix.rows.device)
        means = torch.empty(geometry_.n, channels, dtype=torch.float64, device=matrix.rows.device)
        features = cls(matrix, geometry_.order, shape, norms, means)
        for place in geometry_.places:
            block = features.read(place)
            norms[place], means[place] = decomposition.squared_norms(block), geometry.gap(block)
        return features

    def read(self, index: slice | Tensor) -> Tensor:
        """The features [r, C, P] of these images, float32 at least, minus the centre."""
        return geometry.wide(self.matrix.rows.read(self.order[index])).sub_(self.matrix.centre).view(-1, *self.shape)

    def blocks(self, places: Sequence[slice]) -> Iterator[tuple[slice, Tensor]]:
        """(place, features) of each tile; the block is overwritten by the next one's reader."""
        for place in places:
            yield place, self.read(place)

    def total_norms(self) -> Tensor:
        """|F_i|^2 [n]."""
        return self.norms.sum(1)


def strip_shares(features: SetFeatures, own: Tensor, rows: Tensor, pairs: PairWeights, halves: Sequence[Sequence[slice]]) -> Tensor:
    """sum_j W_ij |F_i(p) - F_j(p)|^2 [halves, m, l, P] over the images j of each half of the set, for the images ``rows`` [l].

    own [l, C, P]: the features of these images.
    """
    result = []
    own = own.to(pairs.dtype)
    i, j = pairs.close
    for places in halves:
        blocks = ((place, block.to(pairs.dtype)) for place, block in features.blocks(places))
        share = decomposition.expanded(pairs.weights, own, blocks, features.norms[rows], features.norms)
        inside = (j >= places[0].start) & (j < places[-1].stop)
        decomposition.add_directly(
            share, i[inside], j[inside], pairs.direct[:, inside], lambda i, j: own[i] - features.read(j).to(pairs.dtype)
        )
        result.append(share)
    return torch.stack(result)
