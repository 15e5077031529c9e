"""The stored table of a study: what is written is read back, to the last digit."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from kdx.errors import KdxError
from kdx.study.table import Cell, CellStatus, Measurement, read_study, write_plan, write_table

CELLS = (
    Cell("digits", "large", ("medium", "small"), "tiny", "kd+at:0.1", 0, "cells/a/run", "a"),
    Cell('a "quoted", name', "small", (), "tiny", "at", 12, "cells/b/run", "b"),
)
PLAN = {"design": {"methods": ["kd", "at"]}, "kdx": "1", "environment": {}, "command": ["kdx", "study"]}
STATUS = {"a": CellStatus("complete"), "b": CellStatus("failed", "It failed.")}


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    numbers = (
        Measurement("a", "", "accuracy(student)", 0.1 + 0.2, 1 / 3, 5e-324, 450),
        Measurement("a", "layer3", "RS(S) - RS(B)", -1.2345678901234567e-9, -math.inf, 2 / 3, 4),
    )
    write_plan(tmp_path, PLAN, CELLS, STATUS)
    write_table(tmp_path, CELLS, numbers)
    study = read_study(tmp_path)
    assert (study.plan, study.cells, study.measurements, study.status) == (PLAN, CELLS, numbers, STATUS)
    with (tmp_path / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["assistants"] for row in rows] == ["medium+small"] * 2
    assert rows[1]["method"] == "kd+at:0.1" and rows[1]["low"] == "-inf"


def test_a_number_that_is_not_known_stays_unknown(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN, CELLS, STATUS)
    write_table(tmp_path, CELLS, [Measurement("a", "layer3", "RS(S)", math.nan, math.nan, math.nan, 4)])
    (number,) = read_study(tmp_path).measurements
    assert math.isnan(number.value) and math.isnan(number.low)


def test_a_study_without_complete_cells_has_no_measurements(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN, CELLS, {})
    study = read_study(tmp_path)
    assert study.measurements == () and {status.state for status in study.status.values()} == {"missing"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no study"),
        ("{", "not readable JSON"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "plan": {}, "cells": [{"state": "lost"}]}', "cannot be read"),
    ],
)
def test_files_that_are_no_study_are_errors(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(KdxError, match=problem):
        read_study(tmp_path)
