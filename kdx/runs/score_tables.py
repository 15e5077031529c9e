"""The scores of a run as tables for a paper: CSV, LaTeX and Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kdx.choices import TABLE_FORMATS, TableFormat
from kdx.disk import csv_text as csv_text
from kdx.errors import KdxError, printable
from kdx.runs import schema
from kdx.runs.measured import Entry
from kdx.runs.number_text import number
from kdx.runs.record import RunRecord

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def score_table(run: RunRecord, format_: TableFormat, digits: int = 3) -> str:
    """The accuracies, scores and differences of a run as text. Raises KdxError for a format that does not exist.

    csv: the rows of scores.csv, with every digit. latex: a booktabs tabular with one row per number and one column per layer. markdown: a
    table of the accuracies and one of the scores. The last two have ``digits`` decimals, and each value has its interval.
    """
    if format_ == "csv":
        return csv_text(schema.SCORES_TABLE_COLUMNS, schema.scores_table_rows(run.stored_scores))
    if format_ == "latex":
        return _latex(run, digits)
    if format_ == "markdown":
        return _markdown(run, digits)
    raise KdxError(f"There is no table format {format_!r}.", f"Give one of: {', '.join(TABLE_FORMATS)}.")


def _groups(run: RunRecord) -> list[list[tuple[str, list[Entry]]]]:
    """The scores, then the differences: each with one entry per layer."""
    return [
        [(name, [(run.scores[layer] | run.contrasts[layer])[name] for layer in run.layers]) for name in names]
        for names in (run.score_names, run.contrast_names)
        if names
    ]


def _cell(entry: Entry, digits: int, sign: bool = False) -> tuple[str, str, str]:
    value, low, high = entry.value, *entry.interval
    return number(value, digits, sign), number(low, digits), number(high, digits)


def _about(run: RunRecord) -> str:
    images = f"{run.explained:,} images of {run.data}"
    return f"kdx {run.kdx}: {images}, geometry {run.geometry}, {100 * run.confidence:.4g}% intervals"


# ---------------------------------------------------------------- Markdown


def _markdown(run: RunRecord, digits: int) -> str:
    accuracies = [
        [role, _plain(_cell(network.accuracy, digits)), f"{network.correct} of {network.n}"] for role, network in run.networks.items()
    ]
    scores = [
        [_markdown_text(name.replace(" - ", " − ")), *(_plain(_cell(entry, digits, bool(sign))) for entry in entries)]
        for sign, group in enumerate(_groups(run))
        for name, entries in group
    ]
    layers = [f"{_markdown_text(layer)}" for layer in run.layers]
    return "\n".join(
        [
            f"{_markdown_text(_about(run))}.",
            "",
            *_markdown_rows(["network", "accuracy", "correct"], accuracies),
            "",
            *_markdown_rows(["score", *layers], scores),
            "",
        ]
    )


def _markdown_rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]


def _plain(cell: tuple[str, str, str]) -> str:
    value, low, high = cell
    return value if low == high == "–" else f"{value} ({low} to {high})"


def _markdown_text(text: str) -> str:
    """Text in which no character is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(printable(text).split()))


# ---------------------------------------------------------------- LaTeX


def _latex(run: RunRecord, digits: int) -> str:
    layers, count = [rf"\texttt{{{_latex_text(layer)}}}" for layer in run.layers], len(run.layers)
    lines = [
        f"% {' '.join(printable(_about(run)).split())}. Needs \\usepackage{{booktabs}}.",
        rf"\begin{{tabular}}{{l{'r' * count}}}",
        r"\toprule",
        f" & {' & '.join(layers)} \\\\",
        r"\midrule",
    ]
    for role, network in run.networks.items():
        lines.append(rf"accuracy of the {role} & \multicolumn{{{count}}}{{c}}{{{_latex_cell(_cell(network.accuracy, digits))}}} \\")
    for sign, group in enumerate(_groups(run)):
        lines.append(r"\midrule")
        for name, entries in group:
            lines.append(f"{_latex_score(name)} & {' & '.join(_latex_cell(_cell(entry, digits, bool(sign))) for entry in entries)} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_cell(cell: tuple[str, str, str]) -> str:
    value, low, high = (f"${part.replace('−', '-')}$" if part != "–" else "--" for part in cell)
    return value if low == high == "--" else f"{value} ({low} to {high})"


def _latex_score(name: str) -> str:
    """The name of a score or a difference as mathematics: RS(S|B) becomes $\\mathrm{RS}(S \\mid B)$."""
    text = re.sub(r"(FSS|RS)\(", r"\\mathrm{\1}(", name)
    return "$" + text.replace("|", r" \mid ") + "$"


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(printable(text).split()))
