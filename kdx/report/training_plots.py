"""Draws the scores of a student during its training, one panel per layer, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdx.report.drawing import INK, WIDTH, as_svg, elided, page_figure, style_axes
from kdx.report.plots import DRAWINGS, Drawing, Series, limits, marker_style
from kdx.runs.training_scores import TrainingScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADING, _PANEL, _AXIS = 26, 92, 36
"""Heights in points: a layer's name, its panel, and the numbers and the label of the epochs."""

_LEFT, _RIGHT = 40, 14

_MARKS = 8
"""About this many marks along a line; more would hide it."""

_LINES = {"student": "-", "base": "--", "teacher": ":"}
"""The line of each role. The scores of base and teacher alone do not change."""


def training_drawings(scores: TrainingScores) -> list[Drawing]:
    """A drawing per group of scores, with the series that every layer has."""
    from markupsafe import Markup

    result = []
    for prefix, title, all_series, from_zero in DRAWINGS:
        series = [line for line in all_series if all(line.score in by_score for by_score in scores.layers.values())]
        if series:
            axis = _limits(scores, series, from_zero)
            svg = Markup(training_plot(scores, series, f"training-{prefix}", axis))  # matplotlib has escaped the names
            result.append(Drawing(title, series, svg, zero=axis[0] <= 0))
    return result


def training_plot(scores: TrainingScores, series: Sequence[Series], prefix: str, axis: tuple[float, float]) -> str:
    """One panel per layer, from top to bottom: the epoch to the right and the score upwards, on the same axes in every panel.

    A vertical line marks the epoch whose weights were kept. A score that is not known is not drawn. `kdx.report.plots.plot` describes the
    colours and the form.
    """
    from matplotlib.ticker import MaxNLocator

    height = len(scores.layers) * (_HEADING + _PANEL) + _AXIS
    first, last = scores.epochs[0], scores.epochs[-1]
    pad = max(0.03 * (last - first), 0.3)
    with page_figure(height) as figure:
        for place, (layer, by_score) in enumerate(scores.layers.items()):
            bottom = height - (place + 1) * (_HEADING + _PANEL)
            axes = figure.add_axes((_LEFT / WIDTH, bottom / height, 1 - (_LEFT + _RIGHT) / WIDTH, _PANEL / height))
            axes.set(xlim=(first - pad, last + pad), ylim=axis)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.locator_params(axis="y", nbins=4)
            _style(axes, is_last=place == len(scores.layers) - 1)
            axes.set_title(elided(layer), loc="left", fontsize=11, fontweight="bold", color=INK, pad=6, parse_math=False)
            if scores.kept is not None:
                axes.axvline(scores.kept, color=INK, alpha=0.45, linewidth=1)
            _draw(axes, scores.epochs, by_score, series)
        return as_svg(figure, prefix)


def _style(axes: Axes, *, is_last: bool) -> None:
    style_axes(axes, grid="y", label_size=10)
    axes.tick_params(labelbottom=is_last)
    if axes.get_ylim()[0] <= 0:
        axes.axhline(0, color=INK, alpha=0.5, linewidth=1)
    if is_last:
        axes.set_xlabel("epoch", color=INK, fontsize=10, labelpad=2)


def _draw(axes: Axes, epochs: Sequence[int], by_score: Mapping[str, Sequence[float | None]], series: Sequence[Series]) -> None:
    step = math.ceil(len(epochs) / _MARKS)
    for line in series:
        values = [math.nan if value is None else value for value in by_score[line.score]]
        style = {**marker_style(line), "markersize": 5, "mew": 1.3}
        marks = slice((len(epochs) - 1) % step, None, step)  # the last epoch has one
        axes.plot(epochs, values, linestyle=_LINES[line.role], linewidth=1.6, markevery=marks, clip_on=False, **style)


def _limits(scores: TrainingScores, series: Sequence[Series], from_zero: bool) -> tuple[float, float]:
    """`kdx.report.plots.limits` for all layers and epochs."""
    missing = math.nan, (math.nan, math.nan)
    points = {
        f"{layer} {place}": {
            line.score: missing if (value := by_score[line.score][place]) is None else (value, (value, value)) for line in series
        }
        for layer, by_score in scores.layers.items()
        for place in range(len(scores.epochs))
    }
    return limits(points, series, from_zero)
