"""The tables of scores, on the page and in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from kdx.report.tables import TABLES
from kdx.report.terminal import scores_table
from kdx.roles import BALANCE, CONTRASTS, EXCESS, GAIN, LEAD, LIKENESS, MAPS, ROLES, SCORES, scores_among


def test_the_page_has_exactly_the_scores_and_maps_that_are_computed() -> None:
    assert [" - ".join(pair) for pair in CONTRASTS] == [LIKENESS, BALANCE, GAIN, LEAD, EXCESS]
    assert [kind.name for kind in MAPS.values()] == list(MAPS)
    for kind in MAPS.values():
        assert kind.score == f"RS({kind.symbol.replace(' ', '')})" and kind.score in SCORES
        assert kind.symbol == " | ".join(role[0].upper() for role in (kind.explained, kind.given) if role)
    in_tables = [name for _, _, names in TABLES for name in names]
    assert sorted(in_tables) == sorted([*SCORES, LIKENESS, BALANCE, GAIN, LEAD, EXCESS])


def test_the_terminal_table_contains_every_score(run: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(scores_table(run))
    text = console.export_text()
    for name in scores_among(ROLES):
        assert name in text
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "0.780 (0.750 to 0.810)" in text
    assert text.startswith("Scores with 95% intervals")
    assert "FSS(S,T) − FSS(B,T)" in text and "+0.100 (0.070 to 0.130)" in text
