"""The section of a run's page with what `kdx evaluate` measured: per metric a sentence, a drawing and a table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdx.report.drawing import INK, WIDTH, as_svg, elided, page_colour, page_figure, style_axes
from kdx.report.layout import DataCell, DataTable
from kdx.runs.evaluation import STEP, Evaluation, Measurement, MetricRecord, read_evaluation
from kdx.runs.number_text import number
from kdx.runs.record import RunRecord

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

_REFERENCE = "centre"
"""The baseline with which the maps are compared, image by image."""

_HEADING, _ROW, _GAP, _AXIS, _MARGIN, _LABELS = 20, 14, 10, 26, 12, 158
"""Lengths in points: a layer's name, a map's row, the space below a layer, the numbers of the axis, the margin, and the names of maps."""

STYLES = {"run": ("o", "student", True), "other": ("D", "muted", True), "baseline": ("s", "muted", False)}
"""The marker, colour and filling of each kind of map."""


@dataclass(frozen=True)
class EvaluationBlock:
    """One number of a metric. statement: the best of the run's maps. tables: of the means, and of the differences from the centre map."""

    title: str
    meaning: str
    reading: str
    statement: str
    svg: Markup
    tables: list[DataTable]


@dataclass(frozen=True)
class EvaluationSection:
    """blocks: per metric. basis: which images were evaluated, as a sentence."""

    basis: str
    blocks: list[EvaluationBlock]


def evaluation_section(run: RunRecord) -> EvaluationSection | None:
    """The section of a run's page; None for a run that was not evaluated."""
    evaluation = read_evaluation(run)
    if evaluation is None or not evaluation.measurements:
        return None
    blocks = [_block(evaluation, metric, part) for metric in evaluation.metrics for part in evaluation.parts(metric)]
    counts = sorted({measurement.n for measurement in evaluation.measurements})
    images = f"{counts[-1]:,} images" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} images"
    return EvaluationSection(f"Means over {images} of this run, with {evaluation.confidence:.0%} intervals over images.", blocks)


def _block(evaluation: Evaluation, metric: str, part: str) -> EvaluationBlock:
    from markupsafe import Markup

    record = evaluation.metrics[metric]
    by_layer = {layer: _sorted(evaluation.of(metric, layer, part), record) for layer in evaluation.layers or (None,)}
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"evaluation-{metric}-{part}").strip("-")
    title = record.title[0].upper() + record.title[1:] + (f" ({part})" if part else "")
    statement = _statement(evaluation, record, by_layer)
    tables = [_means(evaluation, title, name, by_layer)]
    if not part and evaluation.steps(metric):
        tables += [_steps(evaluation, metric, title, name, layer) for layer in by_layer]
    if record.better is not None and any(value.candidate == _REFERENCE for values in by_layer.values() for value in values):
        tables.append(_differences(evaluation, title, name, by_layer))
    svg = Markup(evaluation_plot(evaluation, by_layer, name))  # matplotlib has escaped the names
    reading = {"higher": "Higher is better.", "lower": "Lower is better.", None: ""}[record.better]
    return EvaluationBlock(title, record.meaning, reading, statement, svg, tables)


def _sorted(measurements: Sequence[Measurement], record: MetricRecord) -> list[Measurement]:
    """The best value first, and unknown ones last. Where neither direction is better, the highest is first."""
    sign = 1 if record.better == "lower" else -1
    return sorted(measurements, key=lambda measurement: (math.isnan(measurement.value), sign * measurement.value))


def _statement(evaluation: Evaluation, record: MetricRecord, by_layer: dict[str | None, list[Measurement]]) -> str:
    """Which of the run's maps is best, at which layer, and whether it is better than the centre map in the same images."""
    every = _sorted([value for values in by_layer.values() for value in values], record)
    best = next((value for value in every if evaluation.candidates[value.candidate].kind == "run"), None)
    if best is None or record.better is None or math.isnan(best.value):
        return ""
    place = "" if best.layer is None or len(by_layer) == 1 else f" at {best.layer}"
    text = f"The best of the run’s maps is {evaluation.candidates[best.candidate].title}{place}: {_span(best.value, best.interval)}."
    reference = next((value for value in by_layer[best.layer] if value.candidate == _REFERENCE), None)
    if reference is None:
        return text
    value, (low, high) = evaluation.difference(best, reference)
    better, worse = (low > 0, high < 0) if record.better == "higher" else (high < 0, low > 0)
    verdict = "better than" if better else "worse than" if worse else "not distinguishable from"
    return f"{text} It is {verdict} the centre map: the difference in the same images is {_span(value, (low, high), sign=True)}."


def _span(value: float, interval: tuple[float, float], sign: bool = False) -> str:
    low, high = (number(end, 3, sign) for end in interval)
    return f"{number(value, 3, sign)} ({low} to {high})"


def _titles(evaluation: Evaluation, by_layer: dict[str | None, list[Measurement]]) -> Iterator[tuple[str, str]]:
    """Name and title of every map, in the order of the last layer, which is the deepest."""
    deepest = list(by_layer.values())[-1]
    others = [value for values in by_layer.values() for value in values]
    for name in dict.fromkeys(value.candidate for value in (*deepest, *others)):
        candidate = evaluation.candidates[name]
        yield name, candidate.title + (" (baseline)" if candidate.kind == "baseline" else "")


def _means(evaluation: Evaluation, title: str, name: str, by_layer: dict[str | None, list[Measurement]]) -> DataTable:
    rows = []
    for candidate, label in _titles(evaluation, by_layer):
        cells = [_cell_of(candidate, values) for values in by_layer.values()]
        rows.append([DataCell(label), *cells])
    columns = ["Map", *(layer or "value" for layer in by_layer)]
    return DataTable(name, title, columns, rows)


def _steps(evaluation: Evaluation, metric: str, title: str, name: str, layer: str | None) -> DataTable:
    """The means of a metric's steps at a layer, in their order."""
    steps = {step: evaluation.of(metric, layer, step) for step in evaluation.steps(metric)}
    rows = []
    for candidate, label in _titles(evaluation, {layer: evaluation.of(metric, layer)}):
        rows.append([DataCell(label), *(_cell_of(candidate, values) for values in steps.values())])
    place = "" if layer is None else f" at {layer}"
    columns = ["Map", *(step.removeprefix(STEP) for step in steps)]
    note = "From the output to the part at the head of the column. A map does not depend on the parts behind its layer."
    return DataTable(f"{name}-steps-{layer or ''}", f"{title}{place}, step by step", columns, rows, note)


def _cell_of(candidate: str, values: Sequence[Measurement]) -> DataCell:
    measurement = next((value for value in values if value.candidate == candidate), None)
    return DataCell("") if measurement is None else _cell(measurement.value, measurement.interval)


def _cell(value: float, interval: tuple[float, float], *, sign: bool = False) -> DataCell:
    """A cell; one that is not known has no value for the CSV."""
    if not all(map(math.isfinite, (value, *interval))):
        return DataCell(number(value, 3, sign))
    return DataCell.of(value, interval, sign=sign)


def _differences(evaluation: Evaluation, title: str, name: str, by_layer: dict[str | None, list[Measurement]]) -> DataTable:
    rows = []
    for candidate, label in _titles(evaluation, by_layer):
        cells = []
        for values in by_layer.values():
            by_name = {value.candidate: value for value in values}
            known = {candidate, _REFERENCE} <= by_name.keys() and candidate != _REFERENCE
            difference = evaluation.difference(by_name[candidate], by_name[_REFERENCE]) if known else None
            cells.append(DataCell("") if difference is None else _cell(*difference, sign=True))
        if any(cell.text for cell in cells):
            rows.append([DataCell(label), *cells])
    columns = ["Map", *(layer or "value" for layer in by_layer)]
    note = "Each image’s value minus that of the centre map in the same image. The intervals are not adjusted for the number of maps."
    return DataTable(f"{name}-difference", f"{title}: difference from the centre map", columns, rows, note)


# ---------------------------------------------------------------- the drawing


def evaluation_plot(evaluation: Evaluation, by_layer: dict[str | None, list[Measurement]], prefix: str) -> str:
    """Means as inline SVG: one group per layer with one row per map, in the order of ``by_layer``, and a bar for each interval.

    A dashed line through a layer marks each baseline.
    """
    heights = [_HEADING + _ROW * len(values) + _GAP for values in by_layer.values()]
    height = sum(heights) + _AXIS
    with page_figure(height) as figure:
        axes = figure.add_axes((_LABELS / WIDTH, _AXIS / height, 1 - (_LABELS + _MARGIN) / WIDTH, 1 - _AXIS / height))
        axes.set(xlim=_limits(by_layer), ylim=(sum(heights), 0), yticks=[])
        style_axes(axes, grid="x", label_size=10)
        axes.locator_params(axis="x", nbins=5)
        top = 0.0
        for (layer, values), room in zip(by_layer.items(), heights, strict=True):
            if top:
                axes.axhline(top, color=INK, alpha=0.18, linewidth=1)
            heading = elided(layer or "all layers", 60)
            axes.text(
                -(_LABELS - 8) / (WIDTH - _LABELS - _MARGIN),
                top + _HEADING - 5,
                heading,
                transform=axes.get_yaxis_transform(),
                parse_math=False,
                weight="bold",
            )
            _draw_layer(axes, evaluation, values, top + _HEADING)
            top += room
        return as_svg(figure, prefix)


def _draw_layer(axes: Axes, evaluation: Evaluation, values: Sequence[Measurement], top: float) -> None:
    for place, measurement in enumerate(values):
        y = top + _ROW * (place + 0.5)
        candidate = evaluation.candidates[measurement.candidate]
        marker, colour, filled = STYLES[candidate.kind]
        style: dict[str, Any] = {"color": page_colour(colour), "marker": marker, "markersize": 6 - (marker == "D"), "mew": 1.4}
        title = elided(candidate.title, 30)
        label: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "parse_math": False, "fontsize": 9, "va": "center", "ha": "right"}
        axes.text(-0.035, y, title, **label, style="italic" if candidate.kind == "baseline" else "normal")
        if math.isnan(measurement.value):
            continue
        if candidate.kind == "baseline":
            line: dict[str, Any] = {"color": INK, "alpha": 0.4, "linewidth": 1, "linestyle": (0, (3, 3))}
            axes.plot([measurement.value] * 2, [top, top + _ROW * len(values)], **line)
        if all(map(math.isfinite, measurement.interval)):
            axes.plot(measurement.interval, [y, y], color=style["color"], linewidth=2.5, alpha=0.55, solid_capstyle="round")
        face = style["color"] if filled else page_colour("surface")
        axes.plot([measurement.value], [y], linestyle="none", markerfacecolor=face, **style)


def _limits(by_layer: dict[str | None, list[Measurement]]) -> tuple[float, float]:
    """The ends of the axis: all intervals, and zero."""
    ends = [end for values in by_layer.values() for value in values for end in (value.value, *value.interval) if math.isfinite(end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    pad = 0.04 * ((high - low) or 1)
    return low - pad, high + pad
