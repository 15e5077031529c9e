"""The drawings of a study: marks and bars lie where their numbers are."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from kdx.report.drawing import LINES
from kdx.report.plots import Series
from kdx.study.figures import MOST_ROWS, Line, Mark, Row, interval_rows, line_panels, line_series

STUDENT = Series("s", "student", "student", "o")


def paths(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """The points of every line of this colour, top to bottom."""
    found = re.findall(rf'<path d="([^"]+)"[^>]*style="fill: none;[^"]*stroke: {re.escape(colour)}', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in found]


def test_bars_are_placed_by_their_intervals() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 0.2, 7)
    marks = [Mark(STUDENT, float(x), (float(x) - 0.1 * (i + 1), float(x) + 0.05)) for i, x in enumerate(values)]
    blocks = {"layer<1>": [Row(f"row {i}", [mark]) for i, mark in enumerate(marks[:4])], "b": [Row("$x$", marks[4:])]}
    svg, zero = interval_rows(blocks, "p", from_zero=True)
    assert zero and (svg, zero) == interval_rows(blocks, "p", from_zero=True)
    assert "layer&lt;1&gt;" in svg and "$x$" in svg and "#0102" not in svg
    bars = [path for path in paths(svg, "var(--student)") if len(path) == 2]
    assert len(bars) == 7 and [bar[0][1] for bar in bars] == sorted(bar[0][1] for bar in bars)
    ends = np.array([mark.interval for mark in marks]).ravel()
    x = np.array([[point[0] for point in bar] for bar in bars]).ravel()
    assert np.polyfit(ends, x, 1)[0] > 0 and np.abs(np.polyval(np.polyfit(ends, x, 1), ends) - x).max() < 1e-3


def test_numbers_that_are_not_known_are_not_drawn() -> None:
    unknown = Mark(STUDENT, 0.4, (math.nan, math.nan))
    svg, zero = interval_rows({"a": [Row("row", [unknown, replace(unknown, value=math.nan)])]}, "p")
    assert paths(svg, "var(--student)") == [] and svg.count("<use ") == 1  # one mark, and no bar
    assert "nan" not in svg.lower() and not zero
    many, _ = interval_rows({"a": [Row(f"row {i}", [unknown]) for i in range(100)]}, "p")
    assert many.count(">row ") == MOST_ROWS


def test_lines_have_one_panel_each_and_their_own_look() -> None:
    looks = [line_series(place, str(place)) for place in range(30)]
    assert len({(look.role, look.marker) for look in looks}) == 30 and {look.role for look in looks} == set(LINES)
    line = Line(looks[0], [1, 2, 4], [0.5, 0.7, 0.6], [(0.4, 0.6), (math.nan, math.nan), (0.5, 0.7)])
    svg = line_panels({"one": [line], "two": [replace(line, y=[0.1, 0.2, 0.3], intervals=())]}, "p", "x", [(1, "a"), (4, "b & c")])
    assert "b &amp; c" in svg and "nan" not in svg.lower()
    drawn = paths(svg, "var(--line-1)")
    three, bars = [path for path in drawn if len(path) == 3], [path for path in drawn if len(path) == 2]
    assert len(three) == 2 and len(bars) == 2
    (x, y), (_, below) = (np.array(path).T for path in three)
    assert np.diff(x)[1] == pytest.approx(2 * np.diff(x)[0], rel=1e-3)
    scale = (y[1] - y[0]) / 0.2
    assert scale < 0 and y[2] - y[0] == pytest.approx(0.1 * scale, abs=1e-2) and below.min() > y.max()
    # Panels share their vertical axis.
    assert (below[1] - below[0]) == pytest.approx(0.1 * scale, abs=1e-2)
    assert abs(bars[0][1][1] - bars[0][0][1]) == pytest.approx(-0.2 * scale, abs=1e-2)
