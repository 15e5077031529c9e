"""`kdx evaluate`: measures the maps of a run, writes its page again, and shows the results as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdx.evaluate.evaluate import evaluate
from kdx.report.page import write_page
from kdx.runs.evaluation import Evaluation, Measurement
from kdx.runs.number_text import number

if TYPE_CHECKING:
    from rich.table import Table


def run(folder: Path, **arguments: Any) -> tuple[Evaluation, Path]:
    """Evaluate a run with `kdx.evaluate.evaluate.evaluate`, which has the same arguments; return the result and the path of the page."""
    evaluation = evaluate(folder, **arguments)
    return evaluation, write_page(folder)


def tables(evaluation: Evaluation) -> Iterator[Table]:
    """One table per layer, with a row per map and a column per metric; baselines come last."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = [(metric, part) for metric in evaluation.metrics for part in evaluation.parts(metric)]
    for layer in evaluation.layers or (None,):
        cells: dict[str, dict[tuple[str, str], Measurement]] = {}
        for metric, part in columns:
            for measurement in evaluation.of(metric, layer, part):
                cells.setdefault(measurement.candidate, {})[metric, part] = measurement
        title = Text("Maps" if layer is None else f"Maps of {layer}")
        title.append(f": means over images, with {evaluation.confidence:.0%} intervals")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("map", no_wrap=True)
        for metric, part in columns:
            arrow = {"higher": " ↑", "lower": " ↓", None: ""}[evaluation.metrics[metric].better]
            table.add_column(Text(f"{metric}{f'[{part}]' if part else ''}{arrow}"), justify="right")
        for candidate in sorted(cells, key=lambda name: evaluation.candidates[name].kind == "baseline"):
            row = (_cell(cells[candidate].get(column)) for column in columns)
            table.add_row(Text(evaluation.candidates[candidate].title), *row)
        yield table


def _cell(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    low, high = (number(end, 3) for end in measurement.interval)
    # No-break spaces: a narrow terminal breaks the line between value and interval, not inside the interval.
    return f"[bold]{number(measurement.value, 3)}[/bold] ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"
