"""Draws a sheet of panels as a matplotlib figure with colour bars. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError, printable
from kdx.maps import overlays

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIXELS = 224  # the longer edge of a drawn map, at least
_BAR, _HEAD, _SIDE, _GAP = 0.42, 0.42, 0.28, 0.08  # inches: a colour bar with its numbers, the titles, the names of rows, between panels
_MOST = 400  # panels of a figure


class FigureOptions(TypedDict, total=False):
    """How a figure is drawn; see `kdx.Drawable`."""

    index: int | Sequence[int]
    kinds: Sequence[str]
    scale: Literal["common", "own"]
    cells: Literal["smoothed", "raw"]
    colour_map: str
    edge: float
    dpi: float


@dataclass(frozen=True)
class Panel:
    """One picture of a figure: a map [h, w], an image [H, W, 3], or a map over an image.

    group: panels with the same group have one scale and one colour bar. comparable: False where values of different images have no common
    scale, so that each map gets its own.
    """

    values: NDArray[np.floating] | None
    image: NDArray[np.uint8] | None = None
    signed: bool = False
    group: str = ""
    comparable: bool = True


@dataclass(frozen=True)
class Sheet:
    """The panels of a figure by row, with the titles of the columns and the names of the rows. None leaves a place empty."""

    rows: list[list[Panel | None]]
    titles: list[str]
    names: list[str]


def draw(sheet: Sheet, options: FigureOptions, make: Callable[[tuple[float, float]], Figure]) -> Figure:
    """The sheet on the figure that ``make`` returns for a size in inches. Raises KdxError for more than 400 panels."""
    count = sum(panel is not None for row in sheet.rows for panel in row)
    if count > _MOST:
        raise KdxError(f"A figure of {count} pictures would be too large.", f"Draw at most {_MOST}: choose images with index=[...].")
    columns, edge = len(sheet.titles), float(options.get("edge", 1.5))
    ratios = [_ratio(row) for row in sheet.rows]  # height by width
    side = _SIDE if any(sheet.names) else 0.0
    bars = [_bar_spans(sheet, row) for row in range(len(sheet.rows))]
    cell = edge / max(1.0, *ratios)  # the width of a column
    heights = [cell * ratio + (_BAR if spans else 0.0) + _GAP for ratio, spans in zip(ratios, bars, strict=True)]
    width, height = side + columns * (cell + _GAP) + _GAP, _HEAD + sum(heights)
    figure = make((width, height))
    limits = _limits(sheet, options)

    def place(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    top = _HEAD
    for number, row in enumerate(sheet.rows):
        high = cell * ratios[number]
        for column, panel in enumerate(row):
            axes = place(side + _GAP + column * (cell + _GAP), top, cell, high)
            axes.set_axis_off()
            if number == 0 and sheet.titles[column]:
                axes.set_title(_text(sheet.titles[column], 40), fontsize=7, pad=3, parse_math=False)
            if column == 0 and sheet.names[number]:
                axes.text(
                    -0.06, 0.5, _text(sheet.names[number], 26), transform=axes.transAxes, rotation=90, ha="right", va="center", fontsize=6,
                    parse_math=False,
                )  # fmt: skip
            if panel is not None:
                axes.imshow(_pixels(panel, limits[panel.group], options), interpolation="none" if panel.values is None else "auto")
                if panel.values is not None and not np.any(panel.values):
                    axes.text(0.5, 0.04, "empty map", transform=axes.transAxes, ha="center", fontsize=5, color="0.5")
        for first, last in bars[number]:
            wide = min((last - first + 1) * (cell + _GAP) - _GAP, 3.0)
            axes = place(side + _GAP + first * (cell + _GAP), top + high + 0.06, wide, 0.08)
            _draw_bar(axes, next(panel for panel in row[first:] if panel is not None), limits, options)
        top += heights[number]
    return figure


def _ratio(row: Sequence[Panel | None]) -> float:
    shapes = [(panel.values if panel.image is None else panel.image) for panel in row if panel is not None]
    return max(float(array.shape[0] / array.shape[1]) for array in shapes if array is not None)


def _bar_spans(sheet: Sheet, row: int) -> list[tuple[int, int]]:
    """The first and last column of each colour bar below a row: where the row below does not continue the group of the panels above."""
    groups = [_group(panel) for panel in sheet.rows[row]]
    below = [_group(panel) for panel in sheet.rows[row + 1]] if row + 1 < len(sheet.rows) else [None] * len(groups)
    spans: list[tuple[int, int]] = []
    for column, group in enumerate(groups):
        if group is None or group in below:
            continue
        if spans and spans[-1][1] == column - 1 and groups[column - 1] == group:
            spans[-1] = spans[-1][0], column
        else:
            spans.append((column, column))
    return spans


def _group(panel: Panel | None) -> str | None:
    return None if panel is None or panel.values is None else panel.group


def _limits(sheet: Sheet, options: FigureOptions) -> dict[str, float | None]:
    """The absolute value at which each group's colours end; None where every map has its own scale."""
    limits: dict[str, float | None] = {}
    for panel in (panel for row in sheet.rows for panel in row if panel is not None):
        highest = 0.0 if panel.values is None else float(np.abs(panel.values).max(initial=0.0))
        own = options.get("scale", "common") == "own" or not panel.comparable
        known = limits.get(panel.group)
        limits[panel.group] = None if own else max(highest, known or 0.0)
    return limits


def _pixels(panel: Panel, limit: float | None, options: FigureOptions) -> NDArray[np.uint8]:
    """A panel as RGB [H, W, 3]; small ones are enlarged, so that a smoothed map is smooth."""
    if panel.values is None:
        assert panel.image is not None
        return _repeated(panel.image)
    values = panel.values
    highest = float(np.abs(values).max(initial=0.0)) if limit is None else limit
    t = np.clip(values / highest if highest else values, -1, 1)
    image = None if panel.image is None else _repeated(panel.image)
    size = _enlarged(t.shape) if image is None else (image.shape[0], image.shape[1])
    if options.get("cells", "smoothed") == "raw":
        rows, columns = (((np.arange(n) + 0.5) * count / n).astype(int) for n, count in zip(size, t.shape, strict=True))
        t = t[rows][:, columns]
    return _coloured(t, image, size, panel.signed, options.get("colour_map"))


def _coloured(
    t: NDArray[np.floating], image: NDArray[np.uint8] | None, size: tuple[int, int], signed: bool, colour_map: str | None
) -> NDArray[np.uint8]:
    """Scaled values as colours of this size: over the image, or without one over white if they are signed and opaque if not."""
    table = None if colour_map is None else _table(colour_map)
    if image is not None:
        return overlays.composite(image, t, signed=signed, table=table)
    white = np.full((*size, 3), 255, np.uint8)
    if signed and table is None:
        return overlays.composite(white, t, 1.0, signed=True)
    return overlays.composite(white, t, 1.0, signed=signed, table=table, opaque=True)


def _repeated(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    factor = math.ceil(_PIXELS / max(image.shape[:2]))
    return image if factor <= 1 else image.repeat(factor, 0).repeat(factor, 1)


def _enlarged(shape: tuple[int, ...]) -> tuple[int, int]:
    factor = math.ceil(_PIXELS / max(shape))
    return shape[0] * factor, shape[1] * factor


def _table(name: str) -> NDArray[np.uint8]:
    """A colour map of matplotlib as 256 colours."""
    from matplotlib import colormaps

    if name not in colormaps:
        near = difflib.get_close_matches(name, list(colormaps), n=3) or ["viridis", "cividis", "coolwarm"]
        raise KdxError(f"matplotlib has no colour map {name!r}.", f"Give another name, such as {', '.join(near)}.")
    return np.asarray(np.rint(np.asarray(colormaps[name](np.linspace(0, 1, 256)))[:, :3] * 255), dtype=np.uint8)


def _draw_bar(axes: Any, panel: Panel, limits: dict[str, float | None], options: FigureOptions) -> None:
    """The colours of a group as they look over grey, with the values at the ends."""
    low = -1.0 if panel.signed else 0.0
    t = np.linspace(low, 1, 256)[None]
    grey = None if panel.image is None else np.full((1, 256, 3), 128, np.uint8)
    axes.imshow(_coloured(t, grey, (1, 256), panel.signed, options.get("colour_map")), aspect="auto", extent=(low, 1, 0, 1))
    limit = limits[panel.group]
    ticks = [-1.0, 0.0, 1.0] if panel.signed else [0.0, 1.0]
    axes.set_yticks([])
    axes.set_xticks(ticks, [f"{tick * (1 if limit is None else limit):.2g}".replace("-", "−") for tick in ticks], fontsize=5)
    axes.tick_params(axis="x", length=1.5, width=0.4, pad=1)
    for tick, alignment in zip(axes.get_xticklabels(), ("left", "right") if len(ticks) == 2 else ("left", "center", "right"), strict=True):
        tick.set_horizontalalignment(alignment)
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)
    if limit is None:
        axes.set_xlabel("share of each map’s peak", fontsize=5, labelpad=1)


def _text(text: str, most: int) -> str:
    """A name that a figure can show; an ellipsis replaces the middle of each long line."""
    return "\n".join(
        line if len(line) <= most else f"{line[: most // 2 - 1]}…{line[-(most // 2) :]}" for line in printable(text).splitlines()
    )
