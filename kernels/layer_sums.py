"""The sums from which the similarity of any number of layers follows: of their distances, and of their linear kernels.

The linear kernel K_ij = <x_i, x_j> and the squared distance D_ij^2 = |x_i|^2 + |x_j|^2 - 2 K_ij have the same U-centred matrix up to the
factor -2, since U-centring sends every matrix u_i + u_j (i != j) to zero. One Gram product per layer therefore gives both the distance
correlation and the unbiased HSIC of linear kernels (Song et al., "Feature selection via dependence maximization", JMLR 13, 2012):

    HSIC(K, L) = <K, L> = (tr(K L) + (1'K1)(1'L1)/((n-1)(n-2)) - 2/(n-2) 1'KL1)/(n(n-3))       with diagonals of zero

which is the inner product of the U-centred matrices, as in `kdx.kernels.geometry.combined`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels import geometry, tiles
from kdx.kernels.dispatch import TorchBackend
from kdx.kernels.pair_sums import Division, PairSums
from kdx.kernels.tiles import FeatureDistances, RowBuffer

_BYTES = 1 << 28
"""Memory for the rows of two tiles of one layer, and for the distances of all layers that are computed before they are summed."""


@dataclass(frozen=True, eq=False)
class LayerSums:
    """Sums over the pairs of n images for k layers: of their distances, by parts of the images, and of their squared distances."""

    distances: PairSums
    squares: PairSums

    @classmethod
    def empty(cls, images: Sequence[Tensor], k: int, parts: int | None = None) -> LayerSums:
        device = images[0].device
        return cls(PairSums(Division.of(images, parts), k, device), PairSums(Division.of(images, 1), k, device))

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, to store them."""
        return {
            "pairs": self.distances.pairs,
            "rows": self.distances.rows,
            "square_pairs": self.squares.pairs,
            "square_rows": self.squares.rows,
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerSums:
        """The sums from their `tensors`; the images count as one tile."""
        k, n, parts = tensors["rows"].shape
        sums = cls.empty([torch.arange(n, device=tensors["rows"].device)], k, parts)
        sums.distances.pairs, sums.distances.rows = tensors["pairs"], tensors["rows"]
        sums.squares.pairs, sums.squares.rows = tensors["square_pairs"], tensors["square_rows"]
        return sums


def of_batch(distances: Tensor, parts: int | None = None) -> LayerSums:
    """The sums of a batch from the distances [k, n, n] of k layers, n >= 4. parts: as for `PairSums`."""
    sums = LayerSums.empty([torch.arange(distances.shape[-1], device=distances.device)], len(distances), parts)
    sums.distances.add(0, 0, geometry.u_centered(distances))
    sums.squares.add(0, 0, geometry.u_centered(distances.square()))
    return sums


def of_set(
    layers: Sequence[FeatureDistances],
    *,
    seed: int = 0,
    ops: TorchBackend = TorchBackend(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerSums:
    """The sums over all pairs of n >= 4 images for k layers, with memory for n rows of sums and a few tiles.

    Each tile of each layer is computed once. The images are taken in random order (``seed``), so that the parts are random. progress:
    receives the number of finished tiles and of all tiles.
    """
    n, k = layers[0].rows.shape[0], len(layers)
    side = tile_side(layers)
    generator = torch.Generator().manual_seed(seed)
    run = max(layer.rows.run for layer in layers)
    order = [tile.to(layers[0].norms.device) for tile in tiles.shuffled_tiles(n, side, run, generator)]
    sums = LayerSums.empty(order, k)
    shifts = [layer.means() - layer.means().mean() / 2 for layer in layers]
    step = max(1, _BYTES // (8 * k * side * side) - 1)
    total, done = len(order) * (len(order) + 1) // 2, 0
    buffers = RowBuffer(), RowBuffer()
    # All tiles use the same memory, because the system needs more time to provide new memory than the sums take.
    memory = torch.empty(min(step, len(order)) + 1, k, *[len(order[0])] * 2, dtype=torch.float64, device=order[0].device)
    for a, left in enumerate(order):
        for first in range(a, len(order), step):
            columns = order[first : first + step]
            strips = [tile[:, : len(left), : len(right)] for tile, right in zip(memory, columns, strict=False)]
            for number, layer in enumerate(layers):
                for strip, tile in zip(strips, _tiles(layer, left, columns, ops, buffers), strict=True):
                    strip[number] = tile
            for b, (right, strip) in enumerate(zip(columns, strips, strict=True), first):
                squares = torch.mul(strip, strip, out=memory[-1, :, : len(left), : len(right)])
                _add(sums, a, b, strip, squares, layers, shifts, left, right)
                done += 1
                progress(done, total)
    return sums


def tile_side(layers: Sequence[FeatureDistances]) -> int:
    """Images per side of a tile, so that the rows of two tiles of the widest layer and one tile of every layer fit into memory."""
    widest = max(layer.centre.itemsize * layer.rows.shape[1] for layer in layers)
    side = min(tiles.TILE, _BYTES // (2 * widest), int((_BYTES / (8 * len(layers))) ** 0.5))
    return max(side, 16)


def _tiles(
    layer: FeatureDistances, left: Tensor, columns: Sequence[Tensor], ops: TorchBackend, buffers: tuple[RowBuffer, RowBuffer]
) -> Iterator[Tensor]:
    """The distances [l, r] of a layer between the images ``left`` and each of the tiles ``columns``."""
    rows = buffers[0].centred(layer, left)
    for right in columns:
        others = rows if right is left else buffers[1].centred(layer, right)
        yield ops.centred_distances(rows, others, layer.norms[left].to(rows), layer.norms[right].to(rows))


def _add(
    sums: LayerSums,
    a: int,
    b: int,
    strip: Tensor,
    squares: Tensor,
    layers: Sequence[FeatureDistances],
    shifts: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
) -> None:
    """Add a tile of distances and their squares [k, l, r] minus matrices u_i + u_j, so that the terms are small. Overwrites the tile."""
    for layer, shift, distances, squared in zip(layers, shifts, strip, squares, strict=True):
        distances.sub_(shift[left][:, None]).sub_(shift[right])
        squared.sub_(layer.norms[left][:, None]).sub_(layer.norms[right])
        if a == b:
            distances.fill_diagonal_(0)
            squared.fill_diagonal_(0)
    sums.distances.add(a, b, strip)
    sums.squares.add(a, b, squares)
