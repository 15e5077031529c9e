"""The scores of a run as a table for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdx.remote import as_path
from kdx.report import wording
from kdx.report.tables import names_by_table
from kdx.runs.record import read_run

if TYPE_CHECKING:
    from rich.table import Table


def scores_table(folder: Path) -> Table:
    """The scores and contrasts of the run in ``folder``: one line per number, one column per layer, each value with its interval.

    Raises KdxError where `kdx.runs.record.read_run` does.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    run = read_run(as_path(folder))
    title = f"Scores{' of salient features' if run.salient else ''} with {wording.percent(run.confidence, 0)} intervals"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("score", no_wrap=True)
    for layer in run.layers:
        table.add_column(Text(layer), justify="right")  # Text: a layer's name is not markup
    last_scores = {[name for name in names if name in run.score_names][-1] for *_, names in names_by_table(run)}
    for name in (*run.score_names, *run.contrast_names):
        cells = []
        for layer in run.layers:
            value, interval = wording.span((run.scores[layer] | run.contrasts[layer])[name], 3, sign=name in run.contrast_names)
            # No-break spaces: a narrow terminal breaks the line between value and interval, not inside the interval.
            cells.append(Text.assemble((value, "bold"), f" ({interval})".replace(" to ", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}")))
        table.add_row(name.replace(" - ", " − "), *cells, end_section=name in last_scores)
    return table
