"""Draws the numbers of a study as inline SVG: intervals in rows, and lines in panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdx.report.drawing import INK, LINES, WIDTH, as_svg, elided, page_colour, page_figure, style_axes
from kdx.report.plots import Series, marker_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 24
"""A figure draws so many rows per block at most; the table beside it has all of them."""

_MARKERS = ("o", "s", "D", "^", "v")

_HEADING, _LABEL, _MARK, _GAP, _AXIS, _MARGIN = 22, 14, 11, 7, 26, 18
"""Heights in points: a block's name, a row's label, each of its marks, the space below them, and the axis; and the width of a margin."""

_PANEL_HEADING, _PANEL, _PANEL_AXIS, _LEFT, _RIGHT = 26, 104, 40, 42, 16
"""The heights of a panel's name, of the panel, and of the axis, and the widths beside a panel."""


@dataclass(frozen=True)
class Mark:
    """A value with its interval, in the colour and with the marker of a series. faint: a result that is not settled."""

    series: Series
    value: float
    interval: tuple[float, float]
    faint: bool = False


@dataclass(frozen=True)
class Row:
    label: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Line:
    """Points of a series from left to right, with an interval each, which may be NaN. dashed: the line; its markers are hollow."""

    series: Series
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]] = ()
    dashed: bool = False


def line_series(place: int, name: str, *, filled: bool = True) -> Series:
    """The look of the line number ``place``. Colours repeat after 6 lines with other markers."""
    return Series(name, name, LINES[place % len(LINES)], _MARKERS[(place + place // len(LINES)) % len(_MARKERS)], filled)


def interval_rows(blocks: Mapping[str, Sequence[Row]], prefix: str, *, from_zero: bool = False) -> tuple[str, bool]:
    """Rows with marks and bars for their intervals, in blocks from top to bottom; and whether zero is on the axis.

    A block has at most `MOST_ROWS` rows. A value that is not finite is not drawn, nor is an interval. The SVG is described in
    `kdx.report.plots.plot`.
    """
    blocks = {name: rows[:MOST_ROWS] for name, rows in blocks.items()}
    ends = [x for rows in blocks.values() for row in rows for mark in row.marks for x in (mark.value, *mark.interval) if math.isfinite(x)]
    low, high = _span(ends, from_zero)
    height = sum(_HEADING + sum(map(_row_height, rows)) for rows in blocks.values()) + _AXIS
    with page_figure(height) as figure:
        axes = figure.add_axes((_MARGIN / WIDTH, _AXIS / height, 1 - 2 * _MARGIN / WIDTH, 1 - _AXIS / height))
        axes.set(xlim=(low, high), ylim=(height - _AXIS, 0), yticks=[])
        style_axes(axes, grid="x", label_size=10)
        axes.locator_params(axis="x", nbins=6)
        top = 0.0
        for place, (name, rows) in enumerate(blocks.items()):
            if place:
                axes.axhline(top, color=INK, alpha=0.18, linewidth=1)
            _write(axes, name, top + _HEADING - 6, 11, "bold")
            top += _HEADING
            bottom = top + sum(map(_row_height, rows))
            if low <= 0 <= high:
                axes.plot([0, 0], [top, bottom], color=INK, alpha=0.5, linewidth=1)
            for row in rows:
                _draw_row(axes, row, top)
                top += _row_height(row)
        return as_svg(figure, prefix), low <= 0 <= high


def _row_height(row: Row) -> float:
    return _LABEL + _MARK * len(row.marks) + _GAP


def _write(axes: Axes, text: str, y: float, size: int, weight: str = "normal") -> None:
    colour = INK if weight == "bold" else page_colour("muted")
    transform = axes.get_yaxis_transform()
    label = elided(text, 58)
    # The text hides the lines of the grid behind it.
    ground = {"facecolor": page_colour("surface"), "edgecolor": "none", "pad": 1.5}
    axes.text(0, y, label, transform=transform, parse_math=False, weight=weight, fontsize=size, color=colour, va="baseline", bbox=ground)


def _draw_row(axes: Axes, row: Row, top: float) -> None:
    _write(axes, row.label, top + _LABEL - 3, 10)
    for place, mark in enumerate(row.marks):
        y = top + _LABEL + _MARK * (place + 0.5)
        style = marker_style(mark.series)
        if not math.isfinite(mark.value):
            continue
        if all(map(math.isfinite, mark.interval)):
            axes.plot(mark.interval, [y, y], color=style["color"], linewidth=2.5, alpha=0.4 if mark.faint else 0.65, solid_capstyle="round")
        axes.plot([mark.value], [y], linestyle="none", **style)


def _span(ends: Iterable[float], from_zero: bool, margin: float = 0.06) -> tuple[float, float]:
    """The ends of an axis around these numbers, with a margin as a share of their range."""
    ends = [*ends, 0.0] if from_zero else [*ends]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    pad = margin * (high - low) or 0.05
    return low - pad, high + pad


def line_panels(
    panels: Mapping[str, Sequence[Line]], prefix: str, label: str, ticks: Sequence[tuple[float, str]] | None = None, *, shared: bool = True
) -> str:
    """One panel per name, from top to bottom, with the same horizontal axis.

    label: of that axis. ticks: its positions and their texts, if they are not numbers. shared: whether the panels have the same vertical
    axis too. A vertical axis does not have to include zero.
    """
    height = len(panels) * (_PANEL_HEADING + _PANEL) + _PANEL_AXIS
    xs = [x for lines in panels.values() for line in lines for x in line.x] + [x for x, _ in ticks or ()]
    left, right = _span(xs, False, 0.06 if ticks is None else 0.2)
    common = _span((y for lines in panels.values() for y in _heights(lines)), False)
    with page_figure(height) as figure:
        for place, (name, lines) in enumerate(panels.items()):
            bottom = height - (place + 1) * (_PANEL_HEADING + _PANEL)
            axes = figure.add_axes((_LEFT / WIDTH, bottom / height, 1 - (_LEFT + _RIGHT) / WIDTH, _PANEL / height))
            last = place == len(panels) - 1
            axes.set(xlim=(left, right), ylim=common if shared else _span(_heights(lines), False))
            _label_axes(axes, label, ticks, is_last=last)
            axes.set_title(elided(name), loc="left", fontsize=11, fontweight="bold", color=INK, pad=6, parse_math=False)
            for line in lines:
                _draw_line(axes, line, 0.012 * (right - left))
        return as_svg(figure, prefix)


def _heights(lines: Sequence[Line]) -> list[float]:
    numbers = [y for line in lines for y in (*line.y, *(end for interval in line.intervals for end in interval))]
    return [y for y in numbers if math.isfinite(y)]


def _label_axes(axes: Axes, label: str, ticks: Sequence[tuple[float, str]] | None, *, is_last: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    style_axes(axes, grid="y", label_size=10)
    axes.locator_params(axis="y", nbins=4)
    if ticks is None:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    else:
        axes.set_xticks([x for x, _ in ticks], [elided(text, 18) for _, text in ticks], parse_math=False)
    axes.tick_params(labelbottom=is_last)
    if is_last:
        axes.set_xlabel(label, color=INK, fontsize=10, labelpad=2)


def _draw_line(axes: Axes, line: Line, step: float) -> None:
    """A line, its marks and its bars. Bars of different lines at the same place stand side by side."""
    style = {**marker_style(line.series), "markersize": 6, "mew": 1.4}
    shift = step * (LINES.index(line.series.role) - 2.5) if line.intervals else 0.0
    x = [place + shift for place in line.x]
    for place, (low, high) in zip(x, line.intervals, strict=False):
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([place, place], [low, high], color=style["color"], linewidth=2.2, alpha=0.45, solid_capstyle="round")
    every = max(1, math.ceil(len(x) / 8))
    marks = slice((len(x) - 1) % every, None, every)
    axes.plot(x, line.y, linestyle="--" if line.dashed else "-", linewidth=1.5, markevery=marks, clip_on=False, **style)
