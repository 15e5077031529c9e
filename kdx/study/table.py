"""The stored table of a study: its cells, and every number that was measured in them.

A study's folder has two files in this format:

    study.json  the plan, and every cell with its state
    study.csv   one row per number, joined with the fields of its cell
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from kdx.disk import csv_text, csv_value, read_json, write_atomic
from kdx.errors import KdxError
from kdx.roles import READING_ORDER
from kdx.runs.schema import StoredScores

FORMAT = 1
"""The number that study.json states. It changes when an older kdx can no longer read a new study."""

STUDY_FILE = "study.json"
TABLE_FILE = "study.csv"
LATEX_FILE = "study.tex"

CellState = Literal["missing", "complete", "failed"]
"""missing: the cell is not computed yet. failed: an error ended it; the next start of the study tries again."""

_ASSISTANTS = "+"
"""Separates the names of assistants in study.csv. Names contain none."""


@dataclass(frozen=True)
class Cell:
    """One student of a study: trained by one method, under one teacher, on one data set, with one seed.

    data, teacher, student, method: their names in the study. assistants: the names of the networks between teacher and student, in the
    order in which they learn; empty without. seed: of the training. folder: of the run (`kdx explain`), relative to the study's folder.
    key: unique and readable, such as ``digits/small/tiny/kd/seed0``; with an assistant ``digits/large+medium/tiny/kd/seed0``.
    """

    data: str
    teacher: str
    assistants: tuple[str, ...]
    student: str
    method: str
    seed: int
    folder: str
    key: str


@dataclass(frozen=True)
class Measurement:
    """One number of a cell, with its interval over the images of the cell's run.

    cell: the key of the cell. layer: the student's layer, and empty for an accuracy. score: the name of a score or a contrast
    (`kdx.roles`), such as ``FSS(S,T)`` and ``RS(S) - RS(B)``, or ``accuracy(ROLE)`` such as ``accuracy(student)``. low, high: the
    bounds of the interval; its level is that of the runs. The interval does not contain the spread over seeds. n: the number of images.
    A number that is not known is NaN.
    """

    cell: str
    layer: str
    score: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class CellStatus:
    """The state of a cell. problem: the error of a failed cell, in one sentence; otherwise empty."""

    state: CellState = "missing"
    problem: str = ""


@dataclass(frozen=True)
class Study:
    """A study as stored.

    plan: ``design`` (the resolved contents of the study file), ``kdx`` (the version that started the study), ``environment`` (the machine
    and the packages) and ``command``. cells: all cells of the plan, in its order. measurements: of the complete cells, in the order of the
    cells. status: by the key of the cell.
    """

    plan: Mapping[str, Any]
    cells: tuple[Cell, ...]
    measurements: tuple[Measurement, ...]
    status: Mapping[str, CellStatus] = field(default_factory=dict)


def accuracy_score(role: str) -> str:
    """The name of a network's accuracy among the scores of a study."""
    return f"accuracy({role})"


def measurements_of(cell: str, scores: StoredScores) -> Iterator[Measurement]:
    """The numbers in the scores.json of a cell's run: the accuracy of every network, then every score and contrast of every layer."""
    for role in (role for role in READING_ORDER if role in scores["accuracy"]):
        yield _measurement(cell, "", accuracy_score(role), scores["accuracy"][role])
    for layer, entry in scores["layers"].items():
        for name, score in (entry["scores"] | entry["contrasts"]).items():
            yield _measurement(cell, layer, name, score)


def _measurement(cell: str, layer: str, score: str, stored: Mapping[str, Any]) -> Measurement:
    """``stored`` has value, interval and n; null becomes NaN."""
    value, low, high = (math.nan if number is None else float(number) for number in (stored["value"], *stored["interval"]))
    return Measurement(cell, layer, score, value, low, high, int(stored["n"]))


# ---------------------------------------------------------------- files


def write_plan(folder: Path, plan: Mapping[str, Any], cells: Sequence[Cell], status: Mapping[str, CellStatus]) -> None:
    """Write study.json atomically. The same arguments give the same bytes."""
    content = {"format": FORMAT, "plan": plan, "cells": [{**asdict(cell), **asdict(status.get(cell.key, CellStatus()))} for cell in cells]}
    write_atomic(folder / STUDY_FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_table(folder: Path, cells: Sequence[Cell], measurements: Iterable[Measurement]) -> None:
    """Write study.csv atomically. Floats have every digit, so that reading them gives the same numbers."""
    write_atomic(folder / TABLE_FILE, csv_text(_COLUMNS, _rows(cells, measurements)).encode())


_CELL_FIELDS = tuple(name.name for name in fields(Cell))
_NUMBERS = tuple(name.name for name in fields(Measurement) if name.name != "cell")
_COLUMNS = (*_CELL_FIELDS, *_NUMBERS)


def _rows(cells: Sequence[Cell], measurements: Iterable[Measurement]) -> Iterator[list[Any]]:
    by_key = {cell.key: {**asdict(cell), "assistants": _ASSISTANTS.join(cell.assistants)} for cell in cells}
    for measurement in measurements:
        yield [*by_key[measurement.cell].values(), *(getattr(measurement, name) for name in _NUMBERS)]


def read_study(folder: Path) -> Study:
    """The study in a folder, complete or not; cells that are not complete have no measurements.

    Raises KdxError where there is no study, where a file cannot be read, and for a study of a newer kdx.
    """
    if not (folder / STUDY_FILE).is_file():
        raise KdxError(f"There is no study in {folder}.", "Give the folder that kdx study wrote, the one named with --out.")
    stored = read_json(folder / STUDY_FILE)
    if stored.get("format") != FORMAT:
        raise KdxError(
            f"The study in {folder} has the format {stored.get('format')}, and this kdx reads format {FORMAT}.",
            "Upgrade kdx: pip install --upgrade kdx",
        )
    try:
        cells, status = zip(*map(_cell, stored["cells"]), strict=True)
        measurements = tuple(_read_table(folder / TABLE_FILE))
        plan: Mapping[str, Any] = stored["plan"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise KdxError(
            f"The study in {folder} cannot be read: {error}.", "Run the same kdx study command again; it writes the files."
        ) from error
    return Study(plan, cells, measurements, dict(zip((cell.key for cell in cells), status, strict=True)))


def _cell(stored: Mapping[str, Any]) -> tuple[Cell, CellStatus]:
    if stored["state"] not in get_args(CellState):
        raise ValueError(f"no state {stored['state']!r}")
    values = {name: stored[name] for name in _CELL_FIELDS}
    return Cell(**{**values, "assistants": tuple(values["assistants"])}), CellStatus(stored["state"], stored["problem"])


def _read_table(path: Path) -> Iterator[Measurement]:
    if not path.exists():  # the study has been started and no cell is complete
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            value, low, high = (float(row[name]) for name in ("value", "low", "high"))
            yield Measurement(csv_value(row["key"]), csv_value(row["layer"]), csv_value(row["score"]), value, low, high, int(row["n"]))
