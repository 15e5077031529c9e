"""Symmetric nine-point matrices on grids of images, and the memory layout of fields on such grids.

The points of a grid have four colours, the parities of row and column. Each colour is stored as a flat plane with a ring of zeros, so
that a neighbour is at a constant offset, and work on one colour is a few passes over contiguous memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

OFFSETS = ((0, 0), (0, 1), (1, -1), (1, 0), (1, 1))
"""Offsets (row, column) of the entries that a symmetric stencil stores at each point: its diagonal, and the weights of four neighbours.
A weight is minus the entry of the matrix."""

NEIGHBOURS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))

Colour = tuple[int, int]

COLOURS: tuple[Colour, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))
"""The parities of row and column, in the order in which they are relaxed."""

_VALUES = 1 << 18
"""Points of one colour, in all channels, that are processed at a time, so that the data of a cycle stays in the processor's cache."""


# ---- planes ----


@dataclass(frozen=True)
class Layout:
    """The layout of a grid [..., n, height, width] as four planes [4, ..., length]: colour 2a + b has the points (2i + a, 2j + b).

    Rows of a plane are ``pitch`` apart, one cell more than the number of columns, and images are one row more apart than the number of
    rows; these extra cells and the margins at both ends are zero.
    """

    images: int
    height: int
    width: int

    @cached_property
    def rows(self) -> int:
        return (self.height + 1) // 2

    @cached_property
    def columns(self) -> int:
        return (self.width + 1) // 2

    @cached_property
    def pitch(self) -> int:
        return self.columns + 1

    @cached_property
    def margin(self) -> int:
        return self.pitch + 1

    @cached_property
    def image(self) -> int:
        """Cells from one image to the next."""
        return (self.rows + 1) * self.pitch

    @cached_property
    def length(self) -> int:
        return self.images * self.image + 2 * self.margin

    def zeros(self, *leading: int, like: Tensor) -> Planes:
        return Planes(self, like.new_zeros(4, *leading, self.length))

    def parts(self, channels: int = 1) -> list[range]:
        """The images in parts that are processed one after the other."""
        step = max(1, _VALUES // (channels * self.image))
        return [range(start, min(start + step, self.images)) for start in range(0, self.images, step)]


class Planes:
    """A field on a grid: ``data`` [4, ..., length], with cached views for passes over it."""

    def __init__(self, layout: Layout, data: Tensor) -> None:
        self.layout = layout
        self.data = data
        self._views: dict[tuple[int, int, int, int, int], Tensor] = {}

    def at(self, images: range, y: int, x: int, rows: int = 0) -> Tensor:
        """The points (2i + y, 2j + x) for all cells (i, j) of these images [..., cells], and of ``rows`` more rows at the end."""
        key = (y, x, rows, images.start, images.stop)
        if (view := self._views.get(key)) is None:
            layout = self.layout
            start = layout.margin + images.start * layout.image + (y >> 1) * layout.pitch + (x >> 1)
            view = self.data[2 * (y & 1) + (x & 1), ..., start : start + len(images) * layout.image + rows * layout.pitch]
            self._views[key] = view
        return view

    def cells(self, colour: int) -> Tensor:
        """The cells of a plane that are points, as a view [..., n, rows, columns]."""
        layout = self.layout
        cells: Tensor = self.data[colour, ..., layout.margin : -layout.margin].unflatten(-1, (layout.images, layout.rows + 1, layout.pitch))
        return cells[..., : layout.rows, : layout.columns]

    def largest(self) -> Tensor:
        """The largest magnitude per image [n] of a field [4, c, length]."""
        margin = self.layout.margin
        images = self.data[..., margin:-margin].unflatten(-1, (self.layout.images, -1))
        return torch.maximum(images.amax((0, 1, 3)), -images.amin((0, 1, 3)))

    def split(self, grid: Tensor) -> Planes:
        """Fill the planes from a grid [..., n, height, width]; returns self."""
        for colour in range(4):
            part = grid[..., colour >> 1 :: 2, colour & 1 :: 2]
            self.cells(colour)[..., : part.shape[-2], : part.shape[-1]] = part
        return self

    def merge(self, grid: Tensor) -> Tensor:
        """Fill ``grid`` [..., n, height, width] from the planes; returns ``grid``."""
        for colour in range(4):
            part = grid[..., colour >> 1 :: 2, colour & 1 :: 2]
            part.copy_(self.cells(colour)[..., : part.shape[-2], : part.shape[-1]])
        return grid


# ---- matrices ----


class Stencil:
    """A symmetric matrix: its diagonal, and a weight per point and neighbour, which is minus the entry of the two."""

    def __init__(self, entries: Tensor) -> None:
        """entries: grids [5, n, height, width], in the order of OFFSETS."""
        self.layout = Layout(*entries.shape[1:])
        self.data = entries.new_zeros(len(OFFSETS), 4, self.layout.length)
        self.entries = [Planes(self.layout, data).split(entry) for data, entry in zip(self.data, entries, strict=True)]
        self.diagonal = self.entries[0]

    def weight(self, images: range, at: tuple[int, int], to: tuple[int, int]) -> Tensor:
        """The weights [cells] between the points ``at`` (2i + a, 2j + b) and their neighbours at the offset ``to``."""
        if to in OFFSETS:
            return self.entries[OFFSETS.index(to)].at(images, *at)
        backward = self.entries[OFFSETS.index((-to[0], -to[1]))]
        return backward.at(images, at[0] + to[0], at[1] + to[1])

    def interpolation(self) -> Planes:
        """The scale of bilinear interpolation at each point: the value there of an interpolated constant of one.

        Between two coarse points, it is the relaxed constant with the weights across the line summed; between four coarse points, the
        relaxed constant. Beside a boundary where u is known, it is less than one.
        """
        every = range(self.layout.images)
        scale = self.layout.zeros(like=self.diagonal.data)
        scale.at(every, 0, 0).copy_(self.diagonal.at(every, 0, 0) > 0)
        for a, b in COLOURS[1:]:
            along, across = torch.zeros_like(scale.at(every, a, b)), self.diagonal.at(every, a, b).clone()
            for y, x in NEIGHBOURS:
                weight = self.weight(every, (a, b), (y, x))
                if (a and y) or (b and x):
                    along += weight
                else:
                    across -= weight
            positive = across > 0
            scale.at(every, a, b).copy_(torch.where(positive, along / torch.where(positive, across, 1), 0).clamp_(0, 1))
        return at_the_end(scale)


def at_the_end(scale: Planes) -> Planes:
    """Double ``scale`` in a last row or column that has a coarse point on one side only; returns ``scale``."""
    if scale.layout.height % 2 == 0:
        scale.cells(2)[..., -1, :] *= 2
        scale.cells(3)[..., -1, :] *= 2
    if scale.layout.width % 2 == 0:
        scale.cells(1)[..., -1] *= 2
        scale.cells(3)[..., -1] *= 2
    return scale


def galerkin(entries: Sequence[Planes | float], scale: Planes) -> Tensor:
    """P^T A P on the grid of every other point, as grids [5, n, rows, columns]; P_pI = scale_p tent(p - 2I).

    entries: A's diagonal and weights in the order of OFFSETS; a number if the value is the same at all points.
    """
    layout = scale.layout
    coarse = scale.data.new_zeros(len(OFFSETS), layout.images, layout.rows, layout.columns)
    parts = layout.parts()
    part = Layout(len(parts[0]), layout.height, layout.width)
    edges = [part.zeros(like=scale.data) for _ in OFFSETS]
    for images in parts:
        here = range(len(images))
        for edge, entry, (y, x) in zip(edges, entries, OFFSETS, strict=True):
            for a, b in COLOURS:
                product = torch.mul(scale.at(images, a, b), scale.at(images, a + y, b + x), out=edge.at(here, a, b))
                if isinstance(entry, Planes):
                    product *= entry.at(images, a, b)
        for number, (y, x) in enumerate(OFFSETS):
            total = torch.zeros_like(edges[0].at(here, 0, 0))
            for (row, column, which), share in _COMBINATION[number].items():
                factor = entries[which]
                total.add_(edges[which].at(here, row, column), alpha=share if isinstance(factor, Planes) else share * factor)
            cells = total.unflatten(-1, (len(images), layout.rows + 1, layout.pitch))[:, : layout.rows, : layout.columns]
            within = overlap(layout.rows, layout.columns, y, x)  # weights to neighbours outside the grid are left out
            coarse[number, images.start : images.stop][within] = cells[within]
    return coarse


def _combination(entry: int) -> dict[tuple[int, int, int], float]:
    """(row, column, edge) -> the share of the edge from that place to its neighbour at OFFSETS[edge] in a coarse point's entry."""

    def tent(y: int, x: int) -> float:
        return max(0.0, 1 - abs(y) / 2) * max(0.0, 1 - abs(x) / 2)

    (to_y, to_x), shares = OFFSETS[entry], {}
    for edge, (y, x) in enumerate(OFFSETS):
        for row in range(-2, 3):
            for column in range(-2, 3):
                share = tent(row, column) * tent(row + y - 2 * to_y, column + x - 2 * to_x)
                if edge:
                    share += tent(row + y, column + x) * tent(row - 2 * to_y, column - 2 * to_x)
                if share:  # a weight is minus an entry of the matrix
                    shares[row, column, edge] = share if (edge == 0) == (entry == 0) else -share
    return shares


_COMBINATION = [_combination(entry) for entry in range(len(OFFSETS))]


def overlap(height: int, width: int, y: int, x: int) -> tuple[slice, slice, slice]:
    """The points of grids [n, height, width] that have a neighbour at (y, x)."""
    return slice(None), slice(max(0, -y), height - max(0, y)), slice(max(0, -x), width - max(0, x))


def weight_sum(height: int, width: int, like: Tensor) -> Tensor:
    """s [height, width]: one inside the image, and less at its border."""
    total = like.new_zeros(1, height, width)
    for y, x in NEIGHBOURS:
        total[overlap(height, width, y, x)] += pixel_weight(y, x)
    return total[0]


def pixel_weight(y: int, x: int) -> float:
    """The weight k of a neighbour at (y, x)."""
    return 1 / 12 if y and x else 1 / 6
