"""Multigrid for the equations of linear imputation, batched over images; the channels of an image share one matrix.

With weights k of 1/6 for pixels beside and 1/12 for diagonal ones, s_p their sum inside the image, and u known at kept pixels,

    s_p u_p - sum_q k_pq u_q = 0        at every pixel p that is not kept,

which is symmetric and positive definite. A cycle relaxes (Gauss-Seidel in four colours), restricts the residual to a grid of every
other pixel, solves there in the same way, adds the interpolated correction and relaxes again. Coarse matrices are Galerkin products
P^T A P, so that no mask makes a cycle diverge. P is bilinear and zero at kept pixels; on coarse grids it is scaled by the relaxed
constant (after Dendy, "Black box multigrid", Journal of Computational Physics 48, 1982).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdx.kernels import cuda
from kdx.kernels.stencils import (
    COLOURS,
    NEIGHBOURS,
    OFFSETS,
    Colour,
    Layout,
    Planes,
    Stencil,
    at_the_end,
    galerkin,
    overlap,
    pixel_weight,
    weight_sum,
)

_DENSE = 8
"""A grid with at most this many rows and columns is solved directly."""

_THREADS = 256
"""Threads per block. A launch has one thread per cell of a plane and channel."""


class Grid:
    """One grid: the unknowns u and the right side f, both [4, c, length], and the next coarser grid.

    entries, scale: as in `galerkin`. launcher: launches the kernels of imputation.cu; None computes in PyTorch.
    """

    equations: str
    """The kind of the kernels, "pixels" or "points"."""

    def __init__(
        self,
        channels: int,
        entries: Sequence[Planes | float],
        diagonal: Planes,
        scale: Planes,
        depth: int,
        launcher: cuda.Launcher | None,
    ) -> None:
        layout, like = scale.layout, scale.data
        self.layout = layout
        self.u, self.f = layout.zeros(channels, like=like), layout.zeros(channels, like=like)
        self.coarser = coarser(galerkin([diagonal, *entries], scale), channels, depth + 1, launcher)
        # A point has one, two or four coarse points around it, by its colour; each has the same share.
        self.prolongation = scale
        scale.data *= like.new_tensor((1, 1 / 2, 1 / 2, 1 / 4))[:, None]
        self._share = Planes(layout, scale.data * diagonal.data)
        self._launcher = launcher
        self._channels = channels
        self.parts = layout.parts(channels) if launcher is None else [range(layout.images)]
        part = Layout(len(self.parts[0]), layout.height, layout.width)
        self._residual = part.zeros(channels, like=like)
        self._spare = part.zeros(channels, like=like)  # colour 0: a sum, 1: sums of pairs, 2: the correction

    def relax(self, images: range, colour: Colour) -> None:
        """Solve the equations of one colour for its points."""
        if self._launcher is not None:
            self._launch(f"relax_{self.equations}", self.u.data, self.f.data, *self._factors(), np.int32(2 * colour[0] + colour[1]))
        else:
            self._relaxed(images, colour, self.u.at(images, *colour))

    def restrict(self, images: range) -> Tensor:
        """P^T (f - A u) [c, images, rows, columns]. The last colour was just relaxed, so its residual is zero."""
        residual, here = self._residual, range(len(images))
        if self._launcher is not None:
            self._launch(f"restrict_{self.equations}", self.u.data, self.f.data, *self._factors(), self._share.data, residual.data)
        else:
            for colour in COLOURS[:3]:
                change = self._relaxed(images, colour, residual.at(here, *colour)).sub_(self.u.at(images, *colour))
                change *= self._share.at(images, *colour)
            self._gather(here)
        return residual.cells(0)[:, : len(images)]

    def _gather(self, here: range) -> None:
        """Sum the residuals around each coarse point."""
        total = self._residual.at(here, 0, 0)
        for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            total += self._residual.at(here, y, x)

    def correct(self, images: range) -> None:
        """Add P times the coarser grid's solution to u, except for the last colour, which is relaxed next from the other colours only."""
        here, spare, u = range(len(images)), self._spare, self.u
        self.coarser.fetch(images, spare.cells(2)[:, : len(images)])
        if self._launcher is not None:
            self._launch("correct", spare.data, self.prolongation.data, u.data)
            return
        own = spare.at(here, 1, 0)
        u.at(images, 0, 0).addcmul_(own, self.prolongation.at(images, 0, 0))
        for a, b in ((0, 1), (1, 0)):
            both = torch.add(own, spare.at(here, 1 + 2 * a, 2 * b), out=spare.at(here, 0, 0))
            u.at(images, a, b).addcmul_(both, self.prolongation.at(images, a, b))

    def descend(self, images: range) -> Tensor:
        """Relax every colour, and return the restricted residual [c, images, rows, columns] for the coarser grid."""
        for colour in COLOURS:
            self.relax(images, colour)
        return self.restrict(images)

    def cycle(self) -> None:
        """Move u one step towards the solution."""
        for images in self.parts:
            self.coarser.load(images, self.descend(images))
        self.coarser.solve()
        for images in self.parts:
            self.correct(images)
            for colour in reversed(COLOURS):
                self.relax(images, colour)

    def _relaxed(self, images: range, colour: Colour, out: Tensor) -> Tensor:
        """The values that solve the equations of one colour for its points."""
        raise NotImplementedError

    def _factors(self) -> tuple[Tensor, ...]:
        """The matrix, as the kernels take it."""
        raise NotImplementedError

    def _launch(self, kernel: str, *arguments: Tensor | np.generic) -> None:
        assert self._launcher is not None
        layout = self.layout
        cells = layout.images * layout.image
        suffix = "double" if self.u.data.dtype == torch.float64 else "float"
        shape = tuple(np.int32(size) for size in (cells, layout.pitch, layout.margin, layout.length))
        grid = (-(-cells // _THREADS), self._channels, 1)
        self._launcher.launch("imputation", f"{kernel}_{suffix}", grid, (_THREADS, 1, 1), [*arguments, *shape])


class PixelGrid(Grid):
    """The grid of pixels. The weights are the same everywhere, so the eight neighbours cost six passes.

    The solution of an equation is f_p + sum_q k_pq u_q/s_p, with f at first the kept pixels, and zero elsewhere.
    """

    equations = "pixels"

    def __init__(self, unknown: Tensor, channels: int, launcher: cuda.Launcher | None = None) -> None:
        """``unknown`` [n, h, w]: one at imputed pixels, zero at kept pixels, in the type to compute in."""
        layout = Layout(*unknown.shape)

        def planes(grid: Tensor) -> Planes:
            return layout.zeros(like=unknown).split(grid.expand(unknown.shape))

        sums = weight_sum(layout.height, layout.width, unknown)
        self._gain = planes(unknown / (12 * sums))
        weights = [pixel_weight(y, x) for y, x in OFFSETS[1:]]
        super().__init__(channels, weights, planes(sums), at_the_end(planes(unknown)), 0, launcher)

    def _factors(self) -> tuple[Tensor, ...]:
        return (self._gain.data,)

    def _relaxed(self, images: range, colour: Colour, out: Tensor) -> Tensor:
        (a, b), u, here = colour, self.u, range(len(images))
        # Pairs of diagonal neighbours in a row, plus twice the neighbour between them, for the rows above and below at once.
        pairs = torch.add(u.at(images, a - 1, b - 1, 1), u.at(images, a - 1, b + 1, 1), out=self._spare.at(here, 2 * a - 2, 1, 1))
        pairs.add_(u.at(images, a - 1, b, 1), alpha=2)
        total = torch.add(self._spare.at(here, 2 * a - 2, 1), self._spare.at(here, 2 * a, 1), out=self._spare.at(here, 0, 0))
        total.add_(u.at(images, a, b - 1), alpha=2).add_(u.at(images, a, b + 1), alpha=2)
        return torch.addcmul(self.f.at(images, a, b), self._gain.at(images, a, b), total, out=out)

    def start(self, kept: Tensor) -> None:
        """Set f and u from the kept pixels [c, n, h, w], which are zero elsewhere."""
        self.f.split(kept)
        self.u.data.copy_(self.f.data)

    def refine(self, solution: Planes) -> None:
        """Set f to the residual of the equations at ``solution``, and u to zero, to solve for the correction next.

        The residual is a sum of differences, which are exact where the solution is smooth. Inside a large hole, it is far smaller than
        the rounding of the pixels, but the error that belongs to it is not.
        """
        for images in self.parts:
            for a, b in COLOURS:
                own, difference = solution.at(images, a, b), self._spare.at(range(len(images)), 0, 0)
                cells = self._spare.cells(0)
                residual = self.f.at(images, a, b).zero_()
                for y, x in NEIGHBOURS:
                    torch.sub(solution.at(images, a + y, b + x), own, out=difference)
                    if (edge := _without(a, y, self.layout.height)) is not None:
                        cells[..., edge, :] = 0
                    if (edge := _without(b, x, self.layout.width)) is not None:
                        cells[..., edge] = 0
                    residual.add_(difference, alpha=1 if y and x else 2)
                residual *= self._gain.at(images, a, b)
        self.u.data.zero_()


def _without(parity: int, step: int, size: int) -> int | None:
    """The first or last row (or column) of a plane if its neighbour at ``step`` is outside the image; None if there is no such row."""
    if step < 0 and parity == 0:
        return 0
    return -1 if step > 0 and (size - parity) % 2 else None


class CoarseGrid(Grid):
    """A grid of corrections: every point has its own weights, and u starts from zero."""

    equations = "points"

    def __init__(self, entries: Tensor, channels: int, depth: int, launcher: cuda.Launcher | None) -> None:
        stencil = self._stencil = Stencil(entries)
        super().__init__(channels, stencil.entries[1:], stencil.diagonal, stencil.interpolation(), depth, launcher)
        # One visit of the second grid, which has a sixteenth of the pixels, would leave too large an error.
        self._visits = 2 if depth == 2 else 1
        self._zero = False
        diagonal = stencil.diagonal.data
        positive = diagonal > 0  # a point whose pixels are all kept has an empty row and stays zero
        self._terms: dict[tuple[range, Colour, tuple[Colour, ...]], list[tuple[Tensor, Tensor]]] = {}
        self._inverse = Planes(self.layout, torch.where(positive, 1 / torch.where(positive, diagonal, 1), 0))

    def load(self, images: range, right: Tensor) -> None:
        """Set f of these images from a grid [c, images, height, width]."""
        for colour, (a, b) in enumerate(COLOURS):
            part = right[..., a::2, b::2]
            self.f.cells(colour)[:, images.start : images.stop, : part.shape[-2], : part.shape[-1]] = part

    def fetch(self, images: range, into: Tensor) -> None:
        """Copy u of these images into a grid [c, images, height, width]."""
        for colour, (a, b) in enumerate(COLOURS):
            part = into[..., a::2, b::2]
            part.copy_(self.u.cells(colour)[:, images.start : images.stop, : part.shape[-2], : part.shape[-1]])

    def solve(self) -> None:
        self.u.data.zero_()
        self._zero = True
        for _ in range(self._visits):
            self.cycle()
            self._zero = False

    def descend(self, images: range) -> Tensor:
        if not self._zero or self._launcher is not None:
            return super().descend(images)
        # u starts from zero: colours that were not relaxed yet add nothing, and the residual comes from later colours only. This halves
        # the work.
        here, spare = range(len(images)), self._spare.at(range(len(images)), 0, 0)
        for number, colour in enumerate(COLOURS):
            total = self._add(self.f.at(images, *colour), images, colour, COLOURS[:number], spare)
            torch.mul(total, self._inverse.at(images, *colour), out=self.u.at(images, *colour))
        for number, colour in enumerate(COLOURS[:3]):
            residual = self._residual.at(here, *colour).zero_()
            self._add(residual, images, colour, COLOURS[number + 1 :], residual).mul_(self.prolongation.at(images, *colour))
        self._gather(here)
        return self._residual.cells(0)[:, : len(images)]

    def _factors(self) -> tuple[Tensor, ...]:
        return self._inverse.data, self._stencil.data

    def _relaxed(self, images: range, colour: Colour, out: Tensor) -> Tensor:
        total = self._add(self.f.at(images, *colour), images, colour, COLOURS, self._spare.at(range(len(images)), 0, 0))
        return torch.mul(total, self._inverse.at(images, *colour), out=out)

    def _add(self, total: Tensor, images: range, colour: Colour, of: Sequence[Colour], out: Tensor) -> Tensor:
        """``total`` + sum_q k_pq u_q over the neighbours of these colours."""
        key = (images, colour, tuple(of))
        if key not in self._terms:
            self._terms[key] = [
                (self._stencil.weight(images, colour, (y, x)), self.u.at(images, colour[0] + y, colour[1] + x))
                for y, x in NEIGHBOURS
                if ((colour[0] + y) & 1, (colour[1] + x) & 1) in of
            ]
        for weight, neighbour in self._terms[key]:
            total = torch.addcmul(total, weight, neighbour, out=out)
        return total


class Coarsest:
    """A small grid, solved by the inverse of its matrix."""

    def __init__(self, entries: Tensor, channels: int) -> None:
        _, n, h, w = entries.shape
        place = torch.arange(h * w, device=entries.device).reshape(1, h, w)
        matrix = entries.new_zeros(n, h * w, h * w, dtype=torch.float64)
        for entry, (y, x) in zip(entries, OFFSETS, strict=True):
            here, there = (place[overlap(h, w, *to)].flatten() for to in ((y, x), (-y, -x)))
            values = entry[overlap(h, w, y, x)].flatten(1).double() * (-1 if y or x else 1)
            matrix[:, here, there] = values
            matrix[:, there, here] = values
        # Points whose pixels are all kept have empty rows, and points that share a single unknown pixel have equal rows.
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += torch.where(diagonal > 0, 1e-5 * diagonal, 1)
        self._inverse = torch.linalg.inv(matrix).to(entries.dtype)
        self._values = entries.new_zeros(channels, n, h, w)

    def load(self, images: range, right: Tensor) -> None:
        self._values[:, images.start : images.stop] = right

    def fetch(self, images: range, into: Tensor) -> None:
        into.copy_(self._values[:, images.start : images.stop])

    def solve(self) -> None:
        flat = self._values.flatten(2)  # [c, n, h w]
        flat.copy_((self._inverse @ flat.permute(1, 2, 0)).permute(2, 0, 1))


def coarser(entries: Tensor, channels: int, depth: int, launcher: cuda.Launcher | None) -> CoarseGrid | Coarsest:
    """The grid of a matrix [5, n, h, w]."""
    return Coarsest(entries, channels) if max(entries.shape[2:]) <= _DENSE else CoarseGrid(entries, channels, depth, launcher)
