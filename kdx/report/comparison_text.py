"""The scores of several students as one table for a paper: CSV, LaTeX and Markdown."""

from __future__ import annotations

from kdx.choices import TableFormat
from kdx.disk import csv_text
from kdx.errors import KdxError
from kdx.report.comparison import Comparison
from kdx.report.comparison_tables import ordered_numbers
from kdx.roles import SCORES
from kdx.runs import schema
from kdx.runs.measured import Entry
from kdx.runs.score_tables import (
    latex_cell,
    latex_score,
    latex_text,
    markdown_cell,
    markdown_rows,
    markdown_text,
    rounded_cell,
)


def joint_table(comparison: Comparison, format_: TableFormat, digits: int = 3) -> str:
    """The accuracies, scores and differences of all students as text. Raises KdxError for the numbers of the images.

    csv: the rows of each run's scores.csv after the student's name, with every digit. latex: a booktabs tabular with one row per layer and
    number, and one column per student. markdown: the same table. The last two have ``digits`` decimals, and each value has its interval.
    Accuracies are those of each run's own images.
    """
    if format_ == "csv":
        return csv_text(
            ("student", *schema.SCORES_TABLE_COLUMNS),
            ([name, *row] for name, run in comparison.runs.items() for row in schema.scores_table_rows(run.stored_scores)),
        )
    if format_ == "images":
        raise KdxError("The table of images describes a single run.", "Give one run with --table images.")
    return _latex(comparison, digits) if format_ == "latex" else _markdown(comparison, digits)


def _rows(comparison: Comparison) -> list[tuple[str, str, list[Entry | None]]]:
    """Layer, number and one entry per student."""
    rows = []
    for layer in comparison.layers:
        for number in ordered_numbers(comparison):
            entries = [comparison.entry(student, layer, number) for student in comparison.names]
            if any(entries):
                rows.append((layer, number, entries))
    return rows


def _about(comparison: Comparison) -> str:
    first = comparison.first
    notes = " ".join(comparison.notes)
    return f"{len(comparison.images):,} common images of {first.data}, {100 * first.confidence:.4g}% intervals. {notes}".strip()


def _markdown(comparison: Comparison, digits: int) -> str:
    accuracy = [markdown_cell(rounded_cell(run.networks["student"].accuracy, digits)) for run in comparison.runs.values()]
    rows = [["", "accuracy", *accuracy]]
    for layer, number, entries in _rows(comparison):
        cells = ["–" if entry is None else markdown_cell(rounded_cell(entry, digits, number not in SCORES)) for entry in entries]
        rows.append([markdown_text(layer), markdown_text(number.replace(" - ", " − ")), *cells])
    columns = ["layer", "score", *map(markdown_text, comparison.names)]
    return "\n".join([markdown_text(_about(comparison)), "", *markdown_rows(columns, rows), ""])


def _latex(comparison: Comparison, digits: int) -> str:
    names = " & ".join(map(latex_text, comparison.names))
    accuracy = " & ".join(latex_cell(rounded_cell(run.networks["student"].accuracy, digits)) for run in comparison.runs.values())
    lines = [
        f"% {' '.join(_about(comparison).split())} Needs \\usepackage{{booktabs}}.",
        rf"\begin{{tabular}}{{ll{'r' * len(comparison.names)}}}",
        r"\toprule",
        rf" & & {names} \\",
        r"\midrule",
        rf" & accuracy & {accuracy} \\",
    ]
    last = None
    for layer, number, entries in _rows(comparison):
        if layer != last:
            lines.append(r"\midrule")
        cells = ["--" if entry is None else latex_cell(rounded_cell(entry, digits, number not in SCORES)) for entry in entries]
        head = rf"\texttt{{{latex_text(layer)}}}" if layer != last else ""
        lines.append(rf"{head} & {latex_score(number)} & {' & '.join(cells)} \\")
        last = layer
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
