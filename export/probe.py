"""The layout of a layer's output, learned from what changes in it when images change.

Rows are the axis along which exactly the entry of a changed image changes. The positions are learned from images in which whole rows or
columns of cells are inverted: a token belongs to the cells whose inversion changes it most. The rows and columns are numbered with two
digits, and all cells with the same digit are inverted together, so that a grid of H x W takes about 4 sqrt(H) + 4 sqrt(W) images.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.disk import log
from kdx.features.layout import MOST_EXTRA, Grid, Layout, Tokens, compact, has_aspect, possible_grids, window_order, windows_of

_BASES = 2
"""The number of random images that are changed. The positions that they show must agree."""

_BASES_OF_FEW = 6
"""The same for a grid of few positions, which chance shows more easily."""

_CHUNK = 8
"""Images per pass."""

_SLOW = 5.0
"""Seconds of one set of passes after which it is announced."""

_CLEAR = 0.6
"""The share of positions that must show a known order of tokens. Any other order would agree at one position in H W by chance."""

_IN_PARTS = 0.4
"""The share that must agree in each quarter of the positions."""

_CORRELATED = 0.9
"""The correlation, of rows and of columns, that shows an order of tokens, if no other order comes near it.

Where layers mix positions, the change of a token's own cell may move it less than that of a neighbour. One extra token before the others
shifts the columns by one, and the last one to the next row, which lowers the correlation of the columns by about 6 / width."""

_MANY = 9
"""The number of positions from which chance cannot show an order, so that the first candidate is the layout."""

_APART = 1.2
"""The factor by which the tokens of the positions must stand out more clearly than extra tokens, if their places follow no known order."""


class Probe:
    """Passes of one network over changed images. run: images [m, 3, h, w] in [0, 1] -> each layer's raw output."""

    def __init__(self, run: Callable[[Tensor], Mapping[str, object]], image_size: Grid, like: Tensor) -> None:
        self._run = run
        self._size = image_size
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(_BASES_OF_FEW, 3, *image_size, generator=generator, dtype=torch.float32)
        # Plain noise has the same mean everywhere; patches of another brightness differ in their means too.
        coarse = torch.rand(_BASES_OF_FEW, 3, *(max(1, side // 4) for side in image_size), generator=generator, dtype=torch.float32)
        blocks = torch.nn.functional.interpolate(coarse, image_size)
        self._images = (0.5 * (images + blocks)).to(like)
        self._rows: Mapping[str, object] | None = None
        self._changes: dict[tuple[str, Grid, int], Tensor] = {}

    def sample(self, layer: str) -> object:
        """The layer's output for three images, of which the first two are equal."""
        if self._rows is None:
            self._rows = self._run(self._images[[0, 0, 1]])
        return self._rows.get(layer)

    def rows_axis(self, layer: str) -> int | None:
        """The axis that holds the images, or None."""
        feature = self.sample(layer)
        if not isinstance(feature, Tensor):
            return None
        for axis in (axis for axis, size in enumerate(feature.shape) if size == 3):
            first, second, other = feature.detach().double().unbind(axis)
            rounding = float((first - second).abs().max())
            if float((first - other).abs().max()) > max(10 * rounding, 1e-9 * float(first.abs().max())):
                return axis
        return None

    def layout(self, layer: str, grids: list[Grid]) -> Layout | None:
        """The layout that the changes show clearly, or None. grids: sizes that the network's feature maps have."""
        feature, rows = self.sample(layer), self.rows_axis(layer)
        if rows is None or not isinstance(feature, Tensor) or not 2 <= feature.ndim <= 5:
            return None
        others = [axis for axis in range(feature.ndim) if axis != rows]
        wide = [axis for axis in others if feature.shape[axis] > 1]
        if len(others) == 1 or (len(wide) == 1 and feature.ndim != 3):  # [n, C] and [n, C, 1, 1]
            channels = wide[0] if wide else others[0]
            return Layout(feature.ndim, rows, channels, 1, (1, 1), range(1))
        best: _Candidate | None = None
        for channels, grid in self._readings(layer, rows, others, grids):
            count = math.prod(feature.shape[axis] for axis in others if axis != channels)
            candidate = self._candidate(layer, rows, channels, count, grid)
            if candidate is not None and math.prod(grid) >= _MANY:
                return candidate.layout(feature.ndim)
            if candidate is not None and (best is None or candidate.agreement > best.agreement):
                best = candidate
        return best.layout(feature.ndim) if best is not None else None

    def _readings(self, layer: str, rows: int, others: list[int], grids: list[Grid]) -> list[tuple[int, Grid]]:
        """Every axis that may hold the channels with every grid that the others may form, the likely ones first."""
        feature = self.sample(layer)
        assert isinstance(feature, Tensor)
        ranked = [
            (place, order, channels, grid)
            for order, channels in enumerate(self._channel_axes(layer, rows, others))
            for place, grid in enumerate(_grids([feature.shape[axis] for axis in others if axis != channels], self._size, grids))
        ]
        return [(channels, grid) for *_, channels, grid in sorted(ranked, key=lambda reading: (min(reading[0], 1), reading[1], reading[0]))]

    def _channel_axes(self, layer: str, rows: int, others: list[int]) -> list[int]:
        """The axes that may be the channels: first the one along which the effects of changing the four quadrants of an image differ least.

        Every channel sees the whole image, and a position sees mainly its own part.
        """
        changes = self._raw_changes(layer, rows, (2, 2), _BASES)
        spread = {}
        for axis in others:
            along = changes.movedim(axis + (axis < rows), 1).flatten(2).norm(dim=2)  # [changes, entries]
            along = along[:, along.any(0)]  # without channels that are always 0, as after a ReLU
            shares = along / along.sum(0)
            spread[axis] = float(shares.std(1, correction=0).mean()) if shares.shape[1] > 1 else math.inf
        return sorted(others, key=spread.__getitem__)

    def _candidate(self, layer: str, rows: int, channels: int, count: int, grid: Grid) -> _Candidate | None:
        """The order of ``count`` tokens in a grid if the changes show one."""
        changes = self._magnitudes(layer, rows, channels, grid)
        if not bool(changes.isfinite().all()) or not bool(changes.any()):
            return None
        each = [_Cells.of(change, grid) for change in changes]
        both = _Cells.of((changes / changes.mean((1, 2), keepdim=True).clamp_min(1e-300)).sum(0), grid)
        own = both.exact_order(math.prod(grid))
        if own is not None and all(cells.agreement(own) >= 0.95 for cells in each):
            return _Candidate(rows, channels, count, grid, own, 1.0)
        orders = list(_known_orders(count, grid))
        (agreement, order), *rest = sorted(((both.agreement(order), order) for order in orders), key=lambda item: -item[0])
        # Another order must be clearly worse, and no part of the tokens may contradict this one: an extra token among them shifts the rest.
        # Among many extra tokens, some follow a known order of few positions by chance: those of a finer grid belong to its quadrants.
        by_chance = math.prod(grid) < _MANY and count > math.prod(grid) + 1 and not both.stand_out(order)
        if agreement >= _needed(grid) and not by_chance and (not rest or rest[0][0] < 0.8 * agreement):
            least = min(cells.agreement(order, part) for cells in each for part in _parts(order))
            return _Candidate(rows, channels, count, grid, order, agreement) if least >= _IN_PARTS else None
        if 2 not in grid:
            (correlation, order), *rest = sorted(
                ((min(cells.correlation(order) for cells in each), order) for order in orders), key=lambda item: -item[0]
            )
            if correlation >= _CORRELATED and (not rest or rest[0][0] <= correlation - 0.1):
                parts = [(both.correlation(order, part), [both.correlation(other, part) for _, other in rest]) for part in _parts(order)]
                best = all(own_part >= max(others, default=-1) for own_part, others in parts)
                return _Candidate(rows, channels, count, grid, order, correlation - 0.2) if best else None
        return None

    def _magnitudes(self, layer: str, rows: int, channels: int, grid: Grid) -> Tensor:
        """How much each change moves each token: [bases, changes, tokens]."""
        bases = _BASES if math.prod(grid) >= _MANY else _BASES_OF_FEW
        changes = self._raw_changes(layer, rows, grid, bases).movedim(channels + (channels < rows), -1)
        magnitudes: Tensor = changes.flatten(1, -2).norm(dim=-1).unflatten(0, (bases, -1))
        return magnitudes

    def _raw_changes(self, layer: str, rows: int, grid: Grid, bases: int) -> Tensor:
        """The output for each changed image minus that for its base, with the changes of all bases along the first axis."""
        if (layer, grid, bases) not in self._changes:
            self._pass(grid, bases)
        per_base = self._changes[layer, grid, bases].movedim(rows, 0).double().unflatten(0, (bases, -1))
        changes: Tensor = (per_base[:, 1:] - per_base[:, :1]).flatten(0, 1)
        return changes

    def _pass(self, grid: Grid, bases: int) -> None:
        """Run every base and its changes, and keep the outputs of all layers, with images along the axis of rows."""
        images = torch.cat(
            [torch.stack([base, *(torch.where(mask, 1 - base, base) for mask in self._masks(grid))]) for base in self._images[:bases]]
        )
        parts, start, announced = [], time.monotonic(), False
        for part in images.split(_CHUNK):
            parts.append(self._run(part))
            passed, done = time.monotonic() - start, len(parts) * _CHUNK
            if passed > _SLOW and done < len(images) and not announced:
                log.warning("finding the positions of the layers with changed images, about %.0f s more", passed * (len(images) / done - 1))
                announced = True
        for layer in parts[0]:
            axis = self.rows_axis(layer)
            pieces = [part[layer] for part in parts]
            if axis is not None:
                self._changes[layer, grid, bases] = torch.cat([piece.detach() for piece in pieces if isinstance(piece, Tensor)], axis)

    def _masks(self, grid: Grid) -> Iterator[Tensor]:
        """The pixels [h, w] of the cells with each digit of their row, then of their column."""
        height, width = self._size
        rows = (torch.arange(height) * grid[0]).div(height, rounding_mode="floor")
        columns = (torch.arange(width) * grid[1]).div(width, rounding_mode="floor")
        for digit in _digits(grid[0]):
            yield from (
                (digit[rows] == value)[:, None].expand(height, width).to(self._images.device) for value in range(int(digit.max()) + 1)
            )
        for digit in _digits(grid[1]):
            yield from (
                (digit[columns] == value)[None].expand(height, width).to(self._images.device) for value in range(int(digit.max()) + 1)
            )


@dataclass(frozen=True)
class _Candidate:
    """An order of tokens, and the share of positions whose changes agree with it."""

    rows: int
    channels: int
    count: int
    grid: Grid
    order: Tokens
    agreement: float

    def layout(self, rank: int) -> Layout:
        return Layout(rank, self.rows, self.channels, self.count, self.grid, self.order)


@dataclass(frozen=True)
class _Cells:
    """For each token, the number of the cell whose change moves it most, -1 if there is none, and how clearly: a factor of at least 1.

    centres: the mean row and the mean column of the changes that move each token, weighted by how much they do.
    """

    grid: Grid
    cells: list[int]
    clearness: list[float]
    centres: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, changes: Tensor, grid: Grid) -> _Cells:
        """changes: [changes, tokens], in the order of `Probe._masks`."""
        changes = changes.cpu()
        places, centres, clear, first = [], [], torch.full((changes.shape[1],), math.inf, dtype=changes.dtype), 0
        for size in grid:
            place = torch.full((changes.shape[1],), -1 if size > 1 else 0)
            centre = torch.zeros(changes.shape[1], dtype=changes.dtype)
            votes: list[Tensor] = []
            for digit in _digits(size):
                values = int(digit.max()) + 1
                part = changes[first : first + values]
                first += values
                # A change moves every token a little if the layer mixes positions, and more if it changes more pixels.
                part = part / (part.median(1, keepdim=True).values + 0.1 * part.mean()).clamp_min(1e-300)
                if not votes:
                    above = part - part.amin(0)
                    centre = (torch.arange(values)[:, None] * above).sum(0) / above.sum(0).clamp_min(1e-300)
                top = part.topk(2, dim=0)
                votes.append(top.indices[0])
                clear = torch.minimum(clear, top.values[0] / top.values[1].clamp_min(1e-300))
            for index in range(size):
                expected = [int(digit[index]) for digit in _digits(size)]
                if expected:
                    matches = torch.stack([vote == value for vote, value in zip(votes, expected, strict=True)]).all(0)
                    place = torch.where(matches, index, place)
            places.append(place)
            centres.append(centre)
        cells = torch.where((places[0] < 0) | (places[1] < 0), -1, places[0] * grid[1] + places[1])
        return cls(grid, cells.tolist(), clear.tolist(), (centres[0], centres[1]))

    def agreement(self, order: Tokens, part: range | None = None) -> float:
        """The share of positions, or of a part of them, whose token in this order is moved most by the change of that position."""
        cells = range(len(order)) if part is None else part
        return sum(self.cells[order[cell]] == cell for cell in cells) / len(cells)

    def correlation(self, order: Tokens, part: range | None = None) -> float:
        """The correlation of the tokens' rows and columns in this order with the centres of what moves them, the smaller of the two.

        Of a part of the positions, it is that of the columns alone.
        """
        cells = range(len(order)) if part is None else part
        correlations = [1.0]
        for axis, coordinates in enumerate(torch.unravel_index(torch.tensor(cells), self.grid)):
            if self.grid[axis] > 1 and (part is None or axis == 1):
                pair = torch.stack([coordinates.double(), self.centres[axis][[order[cell] for cell in cells]]])
                correlations.append(float(torch.corrcoef(pair)[0, 1].nan_to_num()))
        return min(correlations)

    def exact_order(self, count: int) -> Tokens | None:
        """The order in which each of ``count`` cells has the token that it moves most clearly.

        None if some cell has none, or if the tokens of the cells do not stand out from the extra ones.
        """
        best: dict[int, int] = {}
        for token, cell in enumerate(self.cells):
            if cell >= 0 and (cell not in best or self.clearness[token] > self.clearness[best[cell]]):
                best[cell] = token
        if len(best) < count:
            return None
        order = [best[cell] for cell in range(count)]
        return compact(order) if self.stand_out(order) else None

    def stand_out(self, order: Sequence[int]) -> bool:
        """Whether the tokens of an order are moved more clearly by one cell than all others."""
        others = [self.clearness[token] for token in range(len(self.cells)) if token not in set(order)]
        return min(self.clearness[token] for token in order) > _APART * max(others, default=1.0)


def _digits(size: int) -> list[Tensor]:
    """The digits of 0, ..., size - 1: none for one, one up to six, and two beyond."""
    numbers = torch.arange(size)
    if size == 1:
        return []
    if size <= 6:
        return [numbers]
    base = math.ceil(math.sqrt(size))
    return [numbers.div(base, rounding_mode="floor"), numbers % base]


def _needed(grid: Grid) -> float:
    """The share of positions that must agree: all of a few."""
    count = math.prod(grid)
    return 1.0 if count <= 4 else 0.85 if count <= 9 else _CLEAR


def _parts(order: Tokens) -> list[range]:
    """The positions in four parts; the whole if they are few."""
    count = len(order)
    if count < 12:
        return [range(count)]
    return [range(count * part // 4, count * (part + 1) // 4) for part in range(4)]


def _known_orders(count: int, grid: Grid) -> Iterator[Tokens]:
    """Reading order, columns and windows, after every possible number of extra tokens."""
    orders: dict[Tokens, None] = {}
    for window, prefix in itertools.product(windows_of(grid), range(count - math.prod(grid) + 1)):
        orders[window_order(grid, window, prefix)] = None
    yield from orders


def _grids(sizes: list[int], image_size: Grid, known: list[Grid]) -> Iterator[Grid]:
    """Grids that positions of these sizes may have: their own, those of the network's feature maps, and those of square patches."""
    own = [(sizes[0], sizes[1])] if len(sizes) == 2 else []
    fitting = possible_grids(math.prod(sizes), image_size, known, MOST_EXTRA if len(sizes) == 1 else 0)
    likely = own and has_aspect(*own[0], image_size)
    grids = [*own, *fitting] if likely else [*fitting, *own]
    yield from dict.fromkeys(grid for grid in grids if grid[0] <= image_size[0] and grid[1] <= image_size[1] and math.prod(grid) > 1)
