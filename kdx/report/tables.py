"""The scores and contrasts of a run in tables, one table per question."""

from __future__ import annotations

from dataclasses import dataclass

from kdx.report import wording
from kdx.roles import BALANCE, CONDITIONAL, EXCESS, GAIN, LEAD, LIKENESS, RELEVANCE, SCORES, SIMILARITY, counterpart
from kdx.runs.measured import Entry
from kdx.runs.record import RunRecord

TABLES = (
    ("Similarity to the teacher", "FSS", (*SIMILARITY, LIKENESS, EXCESS)),
    ("Relevance to the labels", "RS", (*RELEVANCE, GAIN, LEAD)),
    ("Relevance beyond another network", "RS(·|·)", (*CONDITIONAL, BALANCE)),
)
"""Title, symbol and names of each table: the scores, then their contrasts."""

OVERVIEW = {
    "base": (LIKENESS, "RS(S)", "RS(B)", GAIN, "RS(S|B)", "RS(B|S)"),
    "teacher": ("FSS(S,T)", "FSS(R,T)", EXCESS, "RS(S)", "RS(T)", LEAD, "RS(T|S)", "RS(S|T)"),
    None: ("RS(S)",),
}
"""The scores and contrasts of the table at the top of the page, by the student's counterpart."""


@dataclass(frozen=True)
class Column:
    """A score or a contrast: its name with a true minus sign, and its meaning."""

    name: str
    meaning: str
    contrast: bool


@dataclass(frozen=True)
class Cell:
    """A number as text; ``p`` is empty for a number without a p-value."""

    value: str
    interval: str
    p: str


@dataclass(frozen=True)
class ScoreTable:
    title: str
    symbol: str
    columns: list[Column]
    rows: list[tuple[str, list[Cell]]]  # (layer, one cell per column)


def names_by_table(run: RunRecord) -> list[tuple[str, str, list[str]]]:
    """Title, symbol and names of each table that the run has scores for, with the scores and contrasts that the run has."""
    present = {*run.score_names, *run.contrast_names}
    tables = [(title, symbol, [name for name in names if name in present]) for title, symbol, names in TABLES]
    return [table for table in tables if table[-1]]


def score_tables(run: RunRecord) -> list[ScoreTable]:
    return [_table(run, title, symbol, names) for title, symbol, names in names_by_table(run)]


def overview_table(run: RunRecord) -> ScoreTable:
    """The table at the top of the page."""
    present = {*run.score_names, *run.contrast_names}
    return _table(run, "Main scores", "", [name for name in OVERVIEW[counterpart(run.roles)] if name in present])


def _table(run: RunRecord, title: str, symbol: str, names: list[str]) -> ScoreTable:
    rows = [
        (layer, [_cell((run.scores[layer] | run.contrasts[layer])[name], sign=name in run.contrast_names) for name in names])
        for layer in run.layers
    ]
    return ScoreTable(title, symbol, [_column(name) for name in names], rows)


def _column(name: str) -> Column:
    return Column(name.replace(" - ", " − "), SCORES[name].label if name in SCORES else "difference", name not in SCORES)


def _cell(entry: Entry, sign: bool) -> Cell:
    return Cell(*wording.span(entry, 3, sign), "" if entry.p_value is None else wording.probability(entry.p_value))
