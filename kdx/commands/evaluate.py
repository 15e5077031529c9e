"""`kdx evaluate`: measures the maps of a run, writes its page again, and shows the results as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdx.errors import resumable
from kdx.evaluate.evaluate import evaluate
from kdx.report.page import write_page
from kdx.report.terminal import NumberRow, NumberTable
from kdx.runs.evaluation import Evaluation, Measurement
from kdx.runs.number_text import number


def run(folder: Path, **arguments: Any) -> tuple[Evaluation, Path]:
    """Evaluate a run with `kdx.evaluate.evaluate.evaluate`, which has the same arguments; return the result and the path of the page."""
    evaluation = evaluate(folder, **arguments)
    with resumable(lambda: True):  # all results are stored
        return evaluation, write_page(folder)


def tables(evaluation: Evaluation) -> Iterator[NumberTable]:
    """One table per layer, with a row per map and a column per metric; baselines come last."""
    columns = [(metric, part) for metric in evaluation.metrics for part in evaluation.parts(metric)]
    arrows = {"higher": " ↑", "lower": " ↓", None: ""}
    headings = [f"{metric}{f'[{part}]' if part else ''}{arrows[evaluation.metrics[metric].better]}" for metric, part in columns]
    for layer in evaluation.layers or (None,):
        cells: dict[str, dict[tuple[str, str], Measurement]] = {}
        for metric, part in columns:
            for measurement in evaluation.of(metric, layer, part):
                cells.setdefault(measurement.candidate, {})[metric, part] = measurement
        title = f"{'Maps' if layer is None else f'Maps of {layer}'}: means over images, with {evaluation.confidence:.0%} intervals"
        rows = [
            NumberRow(evaluation.candidates[candidate].title, [_cell(cells[candidate].get(column)) for column in columns])
            for candidate in sorted(cells, key=lambda name: evaluation.candidates[name].kind == "baseline")
        ]
        yield NumberTable(title, "map", headings, rows)


def _cell(measurement: Measurement | None) -> tuple[str, str] | None:
    if measurement is None:
        return None
    low, high = (number(end, 3) for end in measurement.interval)
    return number(measurement.value, 3), f"{low} to {high}"
