"""The layout of a layer's output: which axes hold rows, channels and positions, and in which order the positions are.

A `Layout` is data: it turns a raw output into a feature map [n, C, H, W]. A `StatedLayout` is what a user writes after a layer's name.
`kdx.export.layouts` decides which layout a layer has.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.errors import KdxError

Grid = tuple[int, int]
"""Height and width in positions."""

Tokens = range | tuple[int, ...]
"""Numbers of tokens; a range if they follow one another."""

SYNTAX = "vector, channels-first, channels-last, tokens(prefix=1,grid=14x14) or sequence-first(grid=14x14)"
"""Examples of stated layouts, for messages."""

MOST_EXTRA = 16
"""The most extra tokens, such as class and register tokens, beside a grid, where their number is not stated."""

_AXES = {"vector": "nC", "channels-first": "nCHW", "channels-last": "nHWC", "tokens": "nLC", "sequence-first": "LnC"}
"""The axes of each layout that has a name."""

_STATED = re.compile(r"(?P<axes>[A-Za-z-]+)(?:\((?P<options>[^()]*)\))?")


@dataclass(frozen=True)
class Layout:
    """Where rows, channels and positions are in an output of ``rank`` axes.

    rows, channels: their axes. All other axes together hold ``count`` tokens, in row-major order. grid: height and width of the feature
    map. tokens: for each position of the grid in reading order, the number of its token; the tokens that are not listed, such as a class
    token, belong to no position.
    """

    rank: int
    rows: int
    channels: int
    count: int
    grid: Grid
    tokens: Tokens

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an output of this shape can have the layout."""
        return len(shape) == self.rank and math.prod(shape[axis] for axis in self._positions) == self.count

    def as_map(self, raw: Tensor) -> Tensor:
        """The output as a feature map [n, C, H, W]: a view of it, unless the tokens are in another order than the positions."""
        order = (self.rows, self.channels, *self._positions)
        turned = raw if order == tuple(range(self.rank)) else raw.permute(order)
        if self._is_whole and tuple(turned.shape[2:]) == self.grid:
            return turned
        flat = turned.flatten(2) if self.rank > 2 else turned.unsqueeze(2)
        if not self._is_whole:
            if isinstance(self.tokens, range):
                flat = flat[:, :, self.tokens.start : self.tokens.stop]
            else:
                flat = flat.index_select(2, _index(self.tokens, flat.device))
        grid: Tensor = flat.unflatten(2, self.grid)
        return grid

    def prepare(self, device: torch.device) -> None:
        """Make the index of the tokens on a device. A graph that is traced afterwards contains it as a constant."""
        if not isinstance(self.tokens, range):
            _index(self.tokens, device)

    def __str__(self) -> str:
        """In the notation of a stated layout, as far as it has one."""
        letters = ["H", "W"] if self._is_whole and len(self._positions) == 2 else ["L"] * len(self._positions)
        axes = {self.rows: "n", self.channels: "C"} | dict(zip(self._positions, letters, strict=True))
        text = "".join(axes[axis] for axis in range(self.rank))
        text = next((name for name, value in _AXES.items() if value == text), text)
        if self.count == 1 or "H" in axes.values():
            return text
        prefix, suffix = min(self.tokens), self.count - 1 - max(self.tokens)
        options = [f"{name}={number}" for name, number in (("prefix", prefix), ("suffix", suffix)) if number]
        options.append(f"grid={self.grid[0]}x{self.grid[1]}")
        window = next((window for window in windows_of(self.grid) if window_order(self.grid, window, prefix) == self.tokens), None)
        if window is None:
            options.append("in an order of its own")
        elif window[1] != self.grid[1]:
            options.append(f"windows={window[0]}x{window[1]}")
        return f"{text}({','.join(options)})"

    @property
    def _positions(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(self.rank) if axis not in (self.rows, self.channels))

    @property
    def _is_whole(self) -> bool:
        """Whether the tokens are exactly the positions, in reading order."""
        return self.tokens == range(self.count)


@functools.lru_cache(maxsize=256)
def _index(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(tokens, device=device)


@dataclass(frozen=True)
class StatedLayout:
    """A layout as a user states it: ``axes`` such as nLC, and for tokens the extra ones before and after, the grid and the windows."""

    text: str
    axes: str
    prefix: int = 0
    suffix: int = 0
    grid: Grid | None = None
    windows: Grid | None = None

    def layout(self, layer: str, shape: Sequence[int], image_size: Grid) -> Layout:
        """The layout of an output of this shape. Without ``grid``, the tokens form the grid of the images' aspect ratio.

        Raises KdxError if the output cannot have it.
        """
        positions = [axis for axis, letter in enumerate(self.axes) if letter not in "nC"]
        if len(shape) != len(self.axes):
            raise self._error(layer, shape, f"it has {len(shape)} axes")
        rows, channels = self.axes.index("n"), self.axes.index("C")
        count = math.prod(shape[axis] for axis in positions)
        if "H" in self.axes:
            grid = shape[self.axes.index("H")], shape[self.axes.index("W")]
            reading = self.axes.index("H") < self.axes.index("W")
            tokens = range(count) if reading else window_order(grid, (grid[0], 1), 0)
            return Layout(len(shape), rows, channels, count, grid, tokens)
        places = count - self.prefix - self.suffix
        of_images = aspect_grid(places, image_size) if positions else (1, 1)
        resolved = self.grid or of_images
        if resolved is None or resolved[0] * resolved[1] != places:
            wanted = "no grid of the images' aspect ratio; state one with grid=HxW" if resolved is None else f"not {_text(resolved)}"
            raise self._error(layer, shape, f"its {count} tokens leave {places} positions, {wanted}")
        window = self.windows or resolved
        if resolved[0] % window[0] or resolved[1] % window[1]:
            raise self._error(layer, shape, f"windows of {_text(window)} do not divide a grid of {_text(resolved)}")
        return Layout(len(shape), rows, channels, count, resolved, window_order(resolved, window, self.prefix))

    def _error(self, layer: str, shape: Sequence[int], reason: str) -> KdxError:
        return KdxError(
            f"The output {list(shape)} of layer {layer!r} does not have the layout {self.text}: {reason}.",
            f"State another layout after the layer's name: {SYNTAX}.",
        )


def parse_layout(text: str) -> StatedLayout:
    """A stated layout: a name of the five, or axes such as ``LnC``, with options in parentheses.

    The axes are n (images), C (channels) and either L (tokens) or H and W (positions). The options are prefix, suffix (numbers of extra
    tokens), grid and windows (HEIGHTxWIDTH).

    Raises KdxError for anything else.
    """
    match = _STATED.fullmatch(text)
    axes = match and _AXES.get(match["axes"], match["axes"])
    if not match or not axes or sorted(axes) not in [sorted(form) for form in ("nC", "nCL", "nCHW")]:
        raise KdxError(f"{text!r} is not a layout.", f"Write {SYNTAX}.")
    options: dict[str, int | Grid] = {}
    for option in (match["options"] or "").split(","):
        if not option:
            continue
        name, _, value = (part.strip() for part in option.partition("="))
        number = re.fullmatch(r"\d+", value)
        sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value)
        if name in ("prefix", "suffix") and number:
            options[name] = int(value)
        elif name in ("grid", "windows") and sides:
            options[name] = int(sides[1]), int(sides[2])
        else:
            raise KdxError(
                f"{option!r} is not an option of the layout {text!r}.", "The options are prefix=N, suffix=N, grid=HxW, windows=HxW."
            )
    if options and "L" not in axes:
        raise KdxError(f"The layout {text!r} has options, but no tokens.", "Only tokens and sequence-first have options.")
    return StatedLayout(text, axes, **options)  # type: ignore[arg-type]


def window_order(grid: Grid, window: Grid, prefix: int) -> Tokens:
    """For each position in reading order, its token if tokens are ordered by windows, and in reading order within a window.

    A window of the grid's height and width 1 gives tokens that are ordered by columns.
    """
    height, width = grid
    tokens = torch.arange(height * width).view(height // window[0], width // window[1], *window).permute(0, 2, 1, 3)
    return compact((tokens.reshape(-1) + prefix).tolist())


def compact(tokens: Sequence[int]) -> Tokens:
    """Numbers of tokens, as a range if they follow one another."""
    following = range(tokens[0], tokens[0] + len(tokens))
    return following if list(following) == list(tokens) else tuple(tokens)


def windows_of(grid: Grid) -> list[Grid]:
    """The windows by which the tokens of a grid may be ordered: the whole grid first, then columns, squares and rectangles of its shape."""
    height, width = grid
    squares = [(side, side) for side in range(2, min(grid) + 1) if height % side == 0 and width % side == 0]
    parts = [(height // part, width // part) for part in range(2, min(grid)) if height % part == 0 and width % part == 0]
    return list(dict.fromkeys([grid, (height, 1), *squares, *parts]))


def has_aspect(height: int, width: int, image_size: Grid) -> bool:
    """Whether height : width is the images' aspect ratio, up to the rounding of strides to whole positions."""
    return abs(height * image_size[1] - width * image_size[0]) <= image_size[0] + image_size[1]


def possible_grids(tokens: int, image_size: Grid, known: Sequence[Grid] = (), most_extra: int = MOST_EXTRA) -> list[Grid]:
    """The grids of more than one position that this number of tokens may form, with at most ``most_extra`` extra ones; the fewest first.

    They are those of square patches, with the last patch left out or padded, the largest one with exactly the images' aspect ratio, and
    the ``known`` ones that fit.
    """
    height, width = image_size
    grids = list(known)
    for side in range(1, min(image_size) + 1):
        grids += [(height // side, width // side), (-(-height // side), -(-width // side))]
    unit = math.gcd(height, width)
    scale = math.isqrt(max(tokens, 0) * unit * unit // (height * width))
    grids.append((height // unit * scale, width // unit * scale))
    fitting = [grid for grid in dict.fromkeys(grids) if math.prod(grid) > 1 and 0 <= tokens - math.prod(grid) <= most_extra]
    return sorted(fitting, key=lambda grid: tokens - math.prod(grid))


def channels_first(shape: Sequence[int]) -> Layout:
    """The layout [n, C, H, W] of an output of this shape."""
    count = shape[2] * shape[3]
    return Layout(4, 0, 1, count, (shape[2], shape[3]), range(count))


def channels_last(shape: Sequence[int]) -> Layout:
    """The layout [n, H, W, C] of an output of this shape."""
    count = shape[1] * shape[2]
    return Layout(4, 0, 3, count, (shape[1], shape[2]), range(count))


def batch_first_tokens(shape: Sequence[int], grid: Grid, prefix: int) -> Layout:
    """The layout [n, L, C] with a grid in reading order after ``prefix`` extra tokens."""
    return Layout(3, 0, 2, shape[1], grid, window_order(grid, grid, prefix))


def aspect_grid(places: int, image_size: Grid) -> Grid | None:
    """The grid of exactly ``places`` positions with exactly the images' aspect ratio, or None."""
    unit = math.gcd(*image_size)
    ratio = image_size[0] // unit, image_size[1] // unit
    scale = math.isqrt(max(places, 0) // (ratio[0] * ratio[1]))
    grid = ratio[0] * scale, ratio[1] * scale
    return grid if scale and grid[0] * grid[1] == places else None


def _text(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"
