"""Tables of numbers with intervals for a terminal, such as the scores of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdx.remote import as_path
from kdx.report import wording
from kdx.report.tables import names_by_table
from kdx.runs.record import read_run

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class NumberRow:
    """A row of a `NumberTable`: a value and an interval per column, or None where there is none. ends_section: a line follows the row."""

    name: str
    cells: Sequence[tuple[str, str] | None]
    ends_section: bool = False


@dataclass(frozen=True)
class NumberTable:
    """A table that Rich prints. No number is cut: if the lines are too short, intervals are below the values, and the columns are in
    several tables one below the other."""

    title: str
    heading: str
    columns: Sequence[str]
    rows: Sequence[NumberRow]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        def fits(table: Table) -> bool:
            return console.measure(table, options=options.update(width=10_000)).maximum <= options.max_width

        whole = self._table(range(len(self.columns)), " ")
        if fits(whole):
            yield whole
            return
        first = 0
        while first < len(self.columns):
            counts = range(len(self.columns) - first, 0, -1)
            count = next((count for count in counts if fits(self._table(range(first, first + count), "\n"))), 1)
            yield self._table(range(first, first + count), "\n")
            first += count

    def _table(self, columns: Sequence[int], between: str) -> Table:
        """The table with some of the columns. between: the text between a value and its interval."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(self.heading, overflow="fold")
        for column in columns:
            table.add_column(Text(self.columns[column]), justify="right", overflow="fold")  # Text: a layer's name is not markup
        for row in self.rows:
            cells = [row.cells[column] for column in columns]
            texts = ["" if cell is None else self._cell(*cell, between) for cell in cells]
            table.add_row(Text(row.name), *texts, end_section=row.ends_section)
        return table

    @staticmethod
    def _cell(value: str, interval: str, between: str) -> Text:
        from rich.text import Text

        # No-break spaces: a narrow terminal breaks the line between value and interval, not inside the interval.
        unbroken = interval.replace(" to ", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}")
        return Text.assemble((value, "bold"), f"{between}({unbroken})")


def scores_table(folder: Path) -> NumberTable:
    """The scores and contrasts of the run in ``folder``: one line per number, one column per layer, each value with its interval.

    Raises KdxError where `kdx.runs.record.read_run` does.
    """
    run = read_run(as_path(folder))
    title = f"Scores{' of salient features' if run.salient else ''} with {wording.percent(run.confidence, 0)} intervals"
    last_scores = {[name for name in names if name in run.score_names][-1] for *_, names in names_by_table(run)}
    rows = []
    for name in (*run.score_names, *run.contrast_names):
        numbers = [(run.scores[layer] | run.contrasts[layer])[name] for layer in run.layers]
        cells = [wording.span(entry, 3, sign=name in run.contrast_names) for entry in numbers]
        rows.append(NumberRow(name.replace(" - ", " − "), cells, name in last_scores))
    return NumberTable(title, "score", tuple(run.layers), rows)
