"""The scores of a run as tables for a paper: CSV, LaTeX and Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kdx.choices import TABLE_FORMATS, GroupKind, TableFormat
from kdx.disk import csv_text
from kdx.errors import KdxError, printable
from kdx.roles import BALANCE, GAIN, LEAD, LIKENESS, counterpart
from kdx.runs import grouped_scores, schema
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


_MAIN = {
    "base": ("RS(S)", "RS(B)", GAIN, "RS(S|B)", "RS(B|S)", BALANCE, LIKENESS),
    "teacher": ("FSS(S,T)", "RS(S)", "RS(T)", LEAD, "RS(T|S)", "RS(S|T)"),
    None: ("RS(S)",),
}
"""The scores and contrasts of a class or group in a table, by the student's counterpart."""


def main_scores(run: RunRecord) -> list[str]:
    """The scores and contrasts of a class or group that tables and the page show; the CSV files have all."""
    present = {*run.score_names, *run.contrast_names}
    return [name for name in _MAIN[counterpart(run.roles)] if name in present]


def group_table(run: RunRecord, by: GroupKind, format_: TableFormat, digits: int = 3) -> str:
    """The scores of each class or group as text. Raises KdxError for a run without them, and for a format that does not apply.

    csv: the rows of scores_by_class.csv or scores_by_group.csv. latex, markdown: a table per layer with one row per class or group and the
    main scores and differences, each with its interval.
    """
    kind = "classes" if by == "class" else "groups"
    layers = run.class_scores if by == "class" else run.group_scores
    if not any(layers.values()):
        reason = run.left_out.get(kind, f"The run has no scores per {by}.")
        hint = "Explain the data again with --groups COLUMN." if by == "group" else "Explain the data again with --geometry whole."
        raise KdxError(reason, hint)
    if format_ == "csv":
        return csv_text(grouped_scores.grouped_columns(kind), grouped_scores.grouped_rows(run.stored_scores, kind))
    if format_ not in ("latex", "markdown"):
        raise KdxError(f"The scores per {by} have no format {format_!r}.", "Give one of: csv, latex, markdown.")
    names = main_scores(run)
    parts = []
    for layer, groups in layers.items():
        rows = []
        for group, values in groups.items():
            entries = [values.entries.get(name) for name in names]
            cells = [
                None if entry is None else rounded_cell(entry, digits, " - " in name) for name, entry in zip(names, entries, strict=True)
            ]
            rows.append((group, values.n, cells))
        parts.append(_group_markdown(by, layer, names, rows) if format_ == "markdown" else _group_latex(by, layer, names, rows))
    about = " ".join(printable(_about(run)).split())
    start = f"{markdown_text(_about(run))}." if format_ == "markdown" else f"% {about}. Needs \\usepackage{{booktabs}}."
    return "\n".join([start, *parts])


_GroupRow = tuple[str, int, list[tuple[str, str, str] | None]]


def _group_markdown(by: str, layer: str, names: Sequence[str], rows: Sequence[_GroupRow]) -> str:
    columns = [by, "images", *(markdown_text(name.replace(" - ", " − ")) for name in names)]
    cells = [
        [markdown_text(group), f"{n:,}", *("–" if cell is None else markdown_cell(cell) for cell in values)] for group, n, values in rows
    ]
    return "\n".join(["", f"Layer {markdown_text(layer)}:", "", *markdown_rows(columns, cells), ""])


def _group_latex(by: str, layer: str, names: Sequence[str], rows: Sequence[_GroupRow]) -> str:
    lines = [
        f"% layer {' '.join(printable(layer).split())}",
        rf"\begin{{tabular}}{{lr{'r' * len(names)}}}",
        r"\toprule",
        f"{by} & images & {' & '.join(map(latex_score, names))} \\\\",
        r"\midrule",
    ]
    for group, n, values in rows:
        cells = ["--" if cell is None else latex_cell(cell) for cell in values]
        lines.append(f"{latex_text(group)} & {n} & {' & '.join(cells)} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _groups(run: RunRecord) -> list[list[tuple[str, list[Entry]]]]:
    """The scores, then the differences: each with one entry per layer."""
    return [
        [(name, [(run.scores[layer] | run.contrasts[layer])[name] for layer in run.layers]) for name in names]
        for names in (run.score_names, run.contrast_names)
        if names
    ]


def rounded_cell(entry: Entry, digits: int, sign: bool = False) -> tuple[str, str, str]:
    """Value and interval as text, for `latex_cell` and `markdown_cell`."""
    value, low, high = entry.value, *entry.interval
    return number(value, digits, sign), number(low, digits), number(high, digits)


def _about(run: RunRecord) -> str:
    images = f"{run.explained:,} images of {run.data}"
    return f"kdx {run.kdx}: {images}, geometry {run.geometry}, {100 * run.confidence:.4g}% intervals"


# ---------------------------------------------------------------- Markdown


def _markdown(run: RunRecord, digits: int) -> str:
    accuracies = [
        [role, markdown_cell(rounded_cell(network.accuracy, digits)), f"{network.correct} of {network.n}"]
        for role, network in run.networks.items()
    ]
    scores = [
        [markdown_text(name.replace(" - ", " − ")), *(markdown_cell(rounded_cell(entry, digits, bool(sign))) for entry in entries)]
        for sign, group in enumerate(_groups(run))
        for name, entries in group
    ]
    layers = [f"{markdown_text(layer)}" for layer in run.layers]
    return "\n".join(
        [
            f"{markdown_text(_about(run))}.",
            "",
            *markdown_rows(["network", "accuracy", "correct"], accuracies),
            "",
            *markdown_rows(["score", *layers], scores),
            "",
        ]
    )


def markdown_rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table. The first column is aligned left, and the others right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]


def markdown_cell(cell: tuple[str, str, str]) -> str:
    """Value and interval in a Markdown table."""
    value, low, high = cell
    return value if low == high == "–" else f"{value} ({low} to {high})"


def markdown_text(text: str) -> str:
    """Text in which no character is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(printable(text).split()))


# ---------------------------------------------------------------- LaTeX


def _latex(run: RunRecord, digits: int) -> str:
    layers, count = [rf"\texttt{{{latex_text(layer)}}}" for layer in run.layers], len(run.layers)
    lines = [
        f"% {' '.join(printable(_about(run)).split())}. Needs \\usepackage{{booktabs}}.",
        rf"\begin{{tabular}}{{l{'r' * count}}}",
        r"\toprule",
        f" & {' & '.join(layers)} \\\\",
        r"\midrule",
    ]
    for role, network in run.networks.items():
        lines.append(rf"accuracy of the {role} & \multicolumn{{{count}}}{{c}}{{{latex_cell(rounded_cell(network.accuracy, digits))}}} \\")
    for sign, group in enumerate(_groups(run)):
        lines.append(r"\midrule")
        for name, entries in group:
            lines.append(
                f"{latex_score(name)} & {' & '.join(latex_cell(rounded_cell(entry, digits, bool(sign))) for entry in entries)} \\\\"
            )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex_cell(cell: tuple[str, str, str]) -> str:
    """A value with its interval, from `number_text.number`, as LaTeX."""
    value, low, high = (f"${part.replace('−', '-')}$" if part != "–" else "--" for part in cell)
    return value if low == high == "--" else f"{value} ({low} to {high})"


def latex_score(name: str) -> str:
    """The name of a score or a difference as mathematics: RS(S|B) becomes $\\mathrm{RS}(S \\mid B)$."""
    text = re.sub(r"(FSS|RS)\(", r"\\mathrm{\1}(", name)
    return "$" + text.replace("|", r" \mid ") + "$"


def latex_text(text: str) -> str:
    """Text in which no character is a command of LaTeX."""
    return "".join(_LATEX.get(character, character) for character in " ".join(printable(text).split()))
