"""Draws the scores of all layers as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdx import roles
from kdx.report.drawing import INK, WIDTH, as_svg, elided, page_colour, page_figure, style_axes
from kdx.runs.record import RunRecord

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Series:
    """One score in a drawing: its name, its label in the key, the role whose colour it has, and its marker."""

    score: str
    label: str
    role: str
    marker: str
    filled: bool = True


_MARKERS = {"teacher": "D", "student": "o", "base": "s", roles.BASELINE: "s"}


def _series(score: str, label: str, role: str, filled: bool = True) -> Series:
    return Series(score, label, role, _MARKERS[role], filled)


SIMILARITY_SERIES = tuple(
    _series(name, score.label, score.matrices[0], filled=score.matrices[0] != roles.BASELINE) for name, score in roles.SIMILARITY.items()
)
RELEVANCE_SERIES = tuple(_series(name, score.label, score.label) for name, score in roles.RELEVANCE.items())
BEYOND_SERIES = tuple(
    _series(kind.score, f"{kind.explained} beyond {kind.given} ({kind.name})", kind.explained, filled=kind.name != "new")
    for kind in roles.MAPS.values()
    if kind.given is not None
)

DRAWINGS = (
    ("fss", "Similarity to the teacher (FSS)", SIMILARITY_SERIES, False),
    ("rs", "Relevance to the labels (RS)", RELEVANCE_SERIES, True),
    ("beyond", "Relevance beyond another network", BEYOND_SERIES, True),
)
"""Prefix, title, series of each drawing, and whether its axis always includes zero."""

Points = Mapping[str, Mapping[str, tuple[float, tuple[float, float]]]]
"""layer -> score -> (value, interval)."""

_NARROWEST = 0.05  # the shortest axis without zero, so that a smaller difference looks small

_HEADING, _ROW, _GAP, _AXIS, _MARGIN = 22, 15, 12, 26, 18


@dataclass(frozen=True)
class Drawing:
    """A drawing for the page. ``zero``: whether zero is on the axis."""

    title: str
    series: list[Series]
    svg: Markup
    zero: bool


def drawings(run: RunRecord) -> list[Drawing]:
    """The drawings that the run has scores for."""
    from markupsafe import Markup

    points = {layer: {name: (entry.value, entry.interval) for name, entry in scores.items()} for layer, scores in run.scores.items()}
    result = []
    for prefix, title, all_series, from_zero in DRAWINGS:
        series = [line for line in all_series if line.score in run.score_names]
        if series:
            svg = Markup(plot(points, series, prefix, from_zero=from_zero))  # matplotlib has escaped the names
            result.append(Drawing(title, series, svg, zero=limits(points, series, from_zero)[0] <= 0))
    return result


def plot(points: Points, series: Sequence[Series], prefix: str, *, from_zero: bool = True) -> str:
    """Scores as inline SVG: one group per layer in the run's order, with one mark per score and a bar for its interval.

    `limits` defines the axis. It has a line at zero where it includes zero.

    The drawing is transparent. It takes its ink from the surrounding text and the networks' colours from the page, and it is byte for
    byte the same for the same numbers. ``prefix`` makes its ids unique on the page. A score that is not finite is not drawn.
    """
    group = _HEADING + _ROW * len(series) + _GAP
    height = group * len(points) + _AXIS
    with page_figure(height) as figure:
        axes = figure.add_axes((_MARGIN / WIDTH, _AXIS / height, 1 - 2 * _MARGIN / WIDTH, 1 - _AXIS / height))
        axes.set(xlim=limits(points, series, from_zero), ylim=(group * len(points), 0), yticks=[])
        style_axes(axes, grid="x")
        axes.locator_params(axis="x", nbins=6)
        for row, (layer, scores) in enumerate(points.items()):
            top = group * row
            if row:
                axes.axhline(top, color=INK, alpha=0.18, linewidth=1)
            if axes.get_xlim()[0] <= 0:
                # The line starts below the layer's name.
                axes.plot([0, 0], [top + _HEADING - 2, top + group], color=INK, alpha=0.5, linewidth=1)
            axes.text(
                0, top + _HEADING - 5, elided(layer), transform=axes.get_yaxis_transform(), parse_math=False, weight="bold", va="baseline"
            )
            for line, score in enumerate(series):
                _draw_score(axes, score, *scores[score.score], y=top + _HEADING + _ROW * (line + 0.5))
        return as_svg(figure, prefix)


def marker_style(series: Series) -> dict[str, Any]:
    """Colour and marker of a series as matplotlib's arguments."""
    colour = INK if series.role == roles.BASELINE else page_colour(series.role)
    face = colour if series.filled else page_colour("surface")
    size = 7 - 1.5 * (series.marker == "D")
    return {"color": colour, "marker": series.marker, "markerfacecolor": face, "markersize": size, "mew": 1.6}


def _draw_score(axes: Axes, series: Series, value: float, interval: tuple[float, float], y: float) -> None:
    if not all(map(math.isfinite, (value, *interval))):
        return
    style = marker_style(series)
    axes.plot(interval, [y, y], color=style["color"], linewidth=2.5, alpha=0.55, solid_capstyle="round")
    axes.plot([value], [y], linestyle="none", **style)


def limits(points: Points, series: Sequence[Series], from_zero: bool = True) -> tuple[float, float]:
    """The ends of the axis, which includes all intervals and zero, the reference of every score.

    Without ``from_zero`` the axis omits zero where the intervals would fill less than half of it. The question is then which score is
    higher, and an axis from zero would hardly show the answer.
    """
    ends = [x for scores in points.values() for line in series for x in _ends(*scores[line.score])]
    low, high = max(min(ends, default=0.0), -1.0), min(max(ends, default=0.0), 1.0)
    if from_zero or high - low >= 0.5 * high:
        low, high = min(low, 0.0), max(high, 0.2)
    elif high - low < _NARROWEST:
        middle = (low + high) / 2
        low, high = middle - _NARROWEST / 2, middle + _NARROWEST / 2
    pad = 0.04 * (high - low)
    return low - pad, high + pad


def _ends(value: float, interval: tuple[float, float]) -> Iterator[float]:
    yield from filter(math.isfinite, (value, *interval))
