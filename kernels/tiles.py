"""Exact inner products of distance matrices over N images, in tiles of the upper triangle, with O(N x tile) memory.

For images i, j in tiles I, J, the distances D_ij of each matrix are computed once. Everything that scores need of all pairs is summed:

- sum D E for every two matrices, and the row sums of D, each split by equal random *parts* of the images. They give the inner products
  of the U-centred (or double-centred) matrices over all images, and their moments from leaving out parts (see `moments.py`);
- the same under permutations of one matrix's images. The images are in random order, and a permutation turns the images of each tile
  by a random number of places. These permutations are a group, so p-values from random members of the group are exact, and the sums
  for all turns s of a tile's rows and t of its columns are one cross-correlation,

      sum_ij D_ij E_(i+s)(j+t) = IDFT2(conj(DFT2 D) DFT2 E)_st:

  three transforms per tile for any number of permutations.

Centring sends every matrix u_i + u_j (i != j) to zero. Such a matrix, close to the rows' means, is subtracted from each tile first, so
that the terms are small and nothing cancels at the end. Sums are float64 for rows of any type: permutations that give exactly the
same geometry must tie, and an image far from all others, whose distances almost vanish in centring, must not drown the other images.
Randomisation by a subgroup: Hemerik and Goeman, "Exact testing with random permutations", TEST 27 (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from kdx.kernels import geometry
from kdx.kernels.dispatch import TorchBackend
from kdx.kernels.pair_sums import Division
from kdx.kernels.tile_sums import Swept as Swept
from kdx.kernels.tile_sums import TileSums

TILE = 1024
"""Images per side of a tile, at most."""

BLOCKS = 32
"""Blocks of tiles in a sweep, at most. Each has sums of its own until they are added."""

_RUNS = 16
"""The least number of runs of neighbouring rows in a tile, if rows are best read in runs."""

_BYTES = 1 << 28
"""Memory that the rows of a tile may take, for all matrices together."""

GPU_BYTES = 1 << 30
"""The same on a GPU. It computes a small tile faster than the processor launches the work."""

_SAMPLE = 128
"""Rows from which the centre is estimated. More would not make the products of centred rows more exact."""

_READ = 1 << 21
"""Bytes of rows that are read before their centre is subtracted. Small pieces reuse memory, because new memory takes longer than a copy."""


class Rows(Protocol):
    """Rows [n, d] between which distances are measured, in memory or on disk."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def run(self) -> int:
        """The number of neighbouring rows that are best read together."""

    def read(self, index: Tensor) -> Tensor:
        """The rows [k, d] of the images ``index`` [k], on the device. They may share the source's memory and must not be changed."""


@dataclass(frozen=True)
class FeatureDistances:
    """Rows with their squared distances ``norms`` [n] from ``centre`` [d], in float64; a norm is not finite if its row is not."""

    rows: Rows
    centre: Tensor
    norms: Tensor

    @classmethod
    def of(cls, rows: Rows) -> FeatureDistances:
        n, d = rows.shape
        count = min(n, _SAMPLE)
        sample = geometry.wide(rows.read(torch.arange(count, device=rows.device) * n // count))
        sample = sample[sample.isfinite().all(1)]
        # The centre must be among the images, not between them and a few images that are far from all others.
        radius = torch.linalg.vector_norm(sample - sample.mean(0), dim=1)
        centre = sample[radius <= radius.nanmedian()].mean(0)
        everyone, buffer = torch.arange(n, device=rows.device), RowBuffer()
        step = reading_step(rows, max(1, min(TILE, _BYTES // (8 * d))))
        norms = [torch.linalg.vector_norm(buffer.subtracted(rows, part, centre), dim=1) for part in everyone.split(step)]
        return cls(rows, centre, torch.cat(norms).double().square())

    @property
    def scale(self) -> Tensor:
        """An upper estimate [] of the mean squared distance."""
        return 2 * self.norms.mean()

    def batches(self, index: Tensor, ops: TorchBackend) -> Tensor:
        """Distances [b, n, n] of images index [b, n] within each batch, in float64."""
        return ops.distances(self.rows.read(index.flatten()).unflatten(0, index.shape))

    def means(self) -> Tensor:
        """Approximate mean distance of each row from the others [n], as if they were around the centre in all directions."""
        return (self.norms + self.norms.mean()).sqrt()


@dataclass(frozen=True)
class ClassDistances:
    """Rows of few distinct kinds: ``codes`` [n] number the kind of each row, and ``distances`` [c, c] are between the kinds.

    None stands for one-hot rows, whose distances are all the square root of 2.
    """

    codes: Tensor
    distances: Tensor | None = None

    def tile(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """Distances [..., l, r] in float64 between the images ``left`` [..., l] and ``right`` [..., r]."""
        rows, columns = self.codes[left], self.codes[right]
        if self.distances is None:
            return geometry.label_distances(rows, columns, out)
        d = self.distances[rows[..., :, None], columns[..., None, :]]
        return d if out is None else out.copy_(d)

    def batches(self, index: Tensor, ops: TorchBackend) -> Tensor:
        """Distances [b, n, n] of images index [b, n] within each batch, in float64."""
        return self.tile(index, index)

    @property
    def scale(self) -> Tensor:
        """The mean squared distance []."""
        shares = self._shares()
        return 2 * (1 - shares.square().sum()) if self.distances is None else shares @ self.distances.square() @ shares

    def means(self) -> Tensor:
        """Each row's mean distance from the others [n]."""
        shares = self._shares()
        means = 2**0.5 * (1 - shares) if self.distances is None else self.distances @ shares
        return means[self.codes]

    def _shares(self) -> Tensor:
        return torch.bincount(self.codes).double() / len(self.codes)


Matrix = FeatureDistances | ClassDistances


class Sweep:
    """Inner products over all images of k matrices of the same n >= 4 images, in blocks of tiles.

    The blocks depend on the number of tiles only, and their sums are added in order. Each may be computed in another process: the results
    are the same down to the last bit, if all processes use the same number of threads.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        *,
        permuted: Sequence[int] = (),
        permutations: int = 0,
        biased: bool = False,
        seed: int = 0,
        shuffled: bool = False,
        ops: TorchBackend = TorchBackend(),
        classes: Tensor | None = None,
    ) -> None:
        """permuted: the numbers of the matrices whose images are permuted, ``permutations`` times. biased: double-centred instead of
        U-centred. shuffled: whether the images are in random order already, so that neighbours form the tiles. ops: the backend that
        computes distances. classes: the class [n] of each image, as a number from 0, if `Swept.classes` is wanted.

        Raises ValueError if the matrices differ in their number of images.
        """
        measured = [m for m in matrices if isinstance(m, FeatureDistances)]
        n, *others = (len(m.codes) if isinstance(m, ClassDistances) else m.rows.shape[0] for m in matrices)
        if any(other != n for other in others):
            raise ValueError(f"the matrices are of {n} and {others} images")
        device = next((m.norms.device for m in measured), torch.device("cpu"))
        side = tile_side(n, [m.rows for m in measured])
        generator = torch.Generator().manual_seed(seed)
        run = max((m.rows.run for m in measured), default=1)
        order = list(torch.arange(n).split(side)) if shuffled else shuffled_tiles(n, side, run, generator)
        self._tiles = [part.to(device) for part in order]
        turns = [torch.randint(len(part), (permutations,), generator=generator).to(device) for part in self._tiles]
        self._empty = partial(TileSums, self._tiles, Division.of(self._tiles), len(matrices), permuted, turns, classes)
        self._biased = biased
        self._offsets = [torch.zeros_like(m.means()) if biased else m.means() - m.means().mean() / 2 for m in matrices]
        self._shifted = [_ShiftedMatrix(m, offset, ops) for m, offset in zip(matrices, self._offsets, strict=True)]
        self._memory = torch.empty(0, dtype=torch.float64, device=device)
        self._bounds = _block_bounds(len(self._tiles))

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self._bounds) - 1

    def run(self, keep: Callable[[int, int, Tensor], None] | None = None, progress: Callable[[int, int], None] | None = None) -> Swept:
        """The sums over all tiles, and what follows from them.

        keep: receives each tile (a, b) with its distances [k, l, r], which it may not change; a <= b. progress: receives the number of
        finished tiles and of all tiles.
        """
        return self.combined(self.sums(block, keep, progress) for block in range(self.blocks))

    def sums(
        self, block: int, keep: Callable[[int, int, Tensor], None] | None = None, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, ...]:
        """The sums over the tiles of a block, for `combined`. keep, progress: as in `run`."""
        result, tiles = self._empty(), self._tiles
        first, last = self._bounds[block : block + 2]
        for done, (a, b) in enumerate(islice(_pairs(len(tiles)), first, last), first + 1):
            shape = (len(self._shifted), len(tiles[a]), len(tiles[b]))
            if self._memory.shape != shape:  # otherwise reuse memory that is already mapped
                self._memory = self._memory.new_empty(shape)
            d = self._memory
            for matrix, tile in zip(self._shifted, d, strict=True):
                matrix.distances(tiles[a], tiles[b], tile)
            if keep is not None:
                keep(a, b, d)
            for matrix, tile in zip(self._shifted, d, strict=True):
                matrix.shift(tiles[a], tiles[b], tile)
            result.add(a, b, d)
            if progress is not None:
                progress(done, self._bounds[-1])
        return result.sums

    def combined(self, sums: Iterable[Sequence[Tensor]]) -> Swept:
        """What follows from the sums of all blocks, in their order."""
        total = self._empty()
        for each in sums:
            total.add_sums(each)
        return total.combined(self._biased, torch.stack(self._offsets))


def turned_products(centred: Tensor, permuted: int, turns: Tensor) -> Tensor:
    """Inner products [p, k] of centred matrices [b, k, n, n] with the matrix number ``permuted``, summed over b batches.

    Permutation p turns the images of ``permuted`` in batch b by turns [p, b] places. The images of each batch must be in random order.
    Normalised as in `geometry.products`.
    """
    n = centred.shape[-1]
    spectra = torch.fft.rfft2(centred)
    products = torch.fft.irfft2(spectra.conj() * spectra[:, permuted : permuted + 1], s=(n, n)).diagonal(dim1=-2, dim2=-1)
    batch = torch.arange(len(centred), device=centred.device)
    total: Tensor = products[batch, :, turns].sum(1)
    return total / (n * (n - 3))


def tile_side(n: int, rows: Sequence[Rows]) -> int:
    """Images per side of a tile: a power of two, whose transforms are the fastest.

    From 16 images on there are at least four tiles, so that turns permute well: tiles of four images have the most permutations of small
    sets. A tile keeps the rows of every matrix and the columns of one matrix in memory. On a GPU tiles may be larger; p-values are then
    from other random permutations than on a CPU.
    """
    if rows and all(torch.device(r.device).type == "cuda" for r in rows):
        widths = [r.shape[1] * max(r.dtype.itemsize, torch.float32.itemsize) for r in rows]
        return _side(n, 2 * sum(widths), GPU_BYTES)  # rows and columns of every matrix
    return side_for(n, [r.shape[1] * r.dtype.itemsize for r in rows])


def side_for(n: int, widths: Sequence[int]) -> int:
    """`tile_side` on a CPU for rows of these numbers of bytes."""
    return _side(n, sum(widths) + 2 * max(widths, default=0), _BYTES)


def _side(n: int, bytes_per_image: int, most: int) -> int:
    side = TILE
    while side > 16 and side * bytes_per_image > most:
        side //= 2
    while side > 4 and 4 * side > n:
        side //= 2
    return side


def shuffled_tiles(n: int, side: int, run: int, generator: torch.Generator) -> list[Tensor]:
    """The images [n] in random order, in tiles.

    ``run`` neighbours come into one tile, but a tile has at least sixteen runs: images that are stored together may be alike, and
    turning a tile of one class would permute nothing.
    """
    run = max(1, min(run, side // _RUNS))
    runs = torch.randperm(-(-n // run), generator=generator)
    order = (runs[:, None] * run + torch.arange(run)).flatten()
    return [part[torch.randperm(len(part), generator=generator)] for part in order[order < n].split(side)]


def reading_step(rows: Rows, most: int) -> int:
    """The number of rows that are read at once, out of ``most``. On a CPU they are so few that they stay in a cache and their memory is
    reused.

    Rows that are best read in runs, and rows for a GPU, are read together.
    """
    if rows.run > 1 or torch.device(rows.device).type != "cpu":
        return most
    return min(most, max(1, _READ // (rows.shape[1] * rows.dtype.itemsize)))


def block_count(n: int, rows: Sequence[Rows]) -> int:
    """The number of blocks in a `Sweep` over n images, if features are ``rows``."""
    return len(_block_bounds(-(-n // tile_side(n, rows)))) - 1


def _block_bounds(tiles: int) -> list[int]:
    """The numbers of the pairs of so many tiles at which blocks begin and end."""
    pairs = tiles * (tiles + 1) // 2
    blocks = min(BLOCKS, pairs)
    return [block * pairs // blocks for block in range(blocks + 1)]


def _pairs(tiles: int) -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(tiles) for b in range(a, tiles))


class RowBuffer:
    """Memory for the rows of one tile after another. New memory for each tile would take the system longer than the products."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def centred(self, matrix: FeatureDistances, index: Tensor) -> Tensor:
        """The rows [k, d] of these images minus the centre, float32 at least. The next call overwrites them."""
        return self.subtracted(matrix.rows, index, matrix.centre)

    def subtracted(self, rows: Rows, index: Tensor, centre: Tensor) -> Tensor:
        """The rows [k, d] of these images minus ``centre`` [d], float32 at least. The next call overwrites them."""
        shape = len(index), rows.shape[1]
        if self._memory is None or self._memory.numel() < shape[0] * shape[1] or self._memory.dtype != centre.dtype:
            self._memory = torch.empty(shape[0] * shape[1], dtype=centre.dtype, device=centre.device)
        result = self._memory[: shape[0] * shape[1]].view(shape)
        step = reading_step(rows, max(1, len(index)))
        for part, place in zip(index.split(step), result.split(step), strict=True):
            torch.sub(geometry.wide(rows.read(part)), centre, out=place)
        return result


class _ShiftedMatrix:
    """A matrix as tiles: distances minus the offsets of row and column, and zero on the diagonal."""

    def __init__(self, matrix: Matrix, offsets: Tensor, ops: TorchBackend) -> None:
        self._matrix = matrix
        self._ops = ops
        self._offsets = offsets
        self._left: tuple[Tensor, Tensor] | None = None  # the images of the tile's rows, and their features
        self._row_buffer, self._column_buffer = RowBuffer(), RowBuffer()

    def distances(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """The distances [l, r] of the images ``left`` [l] and ``right`` [r], which are the same tensor or have no image in common."""
        if isinstance(self._matrix, ClassDistances):
            self._matrix.tile(left, right, out)
        else:
            out.copy_(self._measured(self._matrix, left, right))

    def shift(self, left: Tensor, right: Tensor, d: Tensor) -> None:
        """Subtract the offsets from these distances in place."""
        d.sub_(self._offsets[left][:, None]).sub_(self._offsets[right])
        if left is right:
            d.fill_diagonal_(0)

    def _measured(self, matrix: FeatureDistances, left: Tensor, right: Tensor) -> Tensor:
        if self._left is None or self._left[0] is not left:
            self._left = left, self._row_buffer.centred(matrix, left)
        rows = self._left[1]
        columns = rows if left is right else self._column_buffer.centred(matrix, right)
        return self._ops.centred_distances(rows, columns, matrix.norms[left].to(rows), matrix.norms[right].to(rows))
