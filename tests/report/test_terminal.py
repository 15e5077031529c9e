"""Tables of numbers in terminals of every width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kdx.report.terminal import NumberRow, NumberTable

COLUMNS = [f"layer{place}.block[{place}] ↑" for place in range(12)]


def cell(row: int, column: int) -> tuple[str, str] | None:
    return None if row == column else (f"−{row}.{column:03}", f"−{row + 1}.{column:03} to {row}.{column:03}")


ROWS = [NumberRow(f"Grad-CAM(S) − CAM({row})", [cell(row, column) for column in range(12)], row == 2) for row in range(5)]


@pytest.mark.parametrize("width", [30, 46, 60, 80, 120, 300, 10_000])
def test_no_number_and_no_name_is_cut(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(NumberTable("Maps of layer4: means over images, with 95% intervals", "map", COLUMNS, ROWS))
    text = console.export_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    for row in range(5):
        for column in range(12):
            value, interval = cell(row, column) or ("", "")
            assert value in text
            assert width < 46 or f"({interval})" in text or not interval
    if width >= 46:
        assert all(name in text for name in [*COLUMNS, *(row.name for row in ROWS)])
    assert (text.count("Maps of layer4") == 1) == (width >= 300)


def test_a_wide_terminal_has_intervals_beside_the_values() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(NumberTable("Scores", "score", ["layer1"], [NumberRow("RS(S)", [("0.5", "0.4 to 0.6")])]))
    assert "RS(S)   0.5 (0.4 to 0.6)" in console.export_text().replace("\N{NO-BREAK SPACE}", " ")
