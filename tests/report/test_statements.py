"""The matrix of statements, from hand-made scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from kdx.report.kinds import page_kinds
from kdx.report.page import write_page
from kdx.report.statements import CLAIMS, mark, statement_matrix
from kdx.roles import EXCESS, GAIN
from kdx.runs.measured import Entry
from kdx.runs.record import read_run
from tests.made_runs import edit, entry, make_run

BEYOND = next(claim for claim in CLAIMS if claim.score == "RS(S|B)")


@pytest.mark.parametrize(
    ("value", "half", "p", "state", "words"),
    [
        (0.3, 0.1, 0.001, "settled", "settled: RS(S|B) +0.30 (95% interval 0.20 to 0.40, p = 0.001)"),
        (0.3, 0.1, 0.2, "open", "not settled: RS(S|B) +0.30"),  # the permutation test does not reject chance
        (0.3, 0.4, 0.001, "open", "not settled"),
        # The permutation test is one-sided: p is near 1 for every negative score, however far below zero it lies.
        (-0.3, 0.1, 1.0, "opposite", "the opposite is settled. The student falls short of the base: RS(S|B) −0.30"),
        (-0.3, 0.4, 1.0, "open", "not settled"),
    ],
)
def test_a_mark_is_filled_only_where_interval_and_permutation_test_agree(
    value: float, half: float, p: float, state: str, words: str
) -> None:
    actual = mark(BEYOND, Entry.of(entry(value, half, p)), 0.95)
    assert actual.state == state and actual.text.startswith(words)


def test_the_adjusted_p_value_decides_and_is_stated() -> None:
    actual = mark(BEYOND, Entry.of({**entry(0.3, 0.1, 0.04), "p_adjusted": 0.08}), 0.95)
    assert actual.state == "open" and actual.text.endswith("(95% interval 0.20 to 0.40, p = 0.040, adjusted for the layers p = 0.080)")


def test_a_number_that_is_missing_or_unknown_has_a_mark_of_its_own() -> None:
    unknown = Entry.of({"value": None, "interval": [None, None], "p_value": None})
    assert mark(BEYOND, None, 0.95).state == mark(BEYOND, unknown, 0.95).state == "unknown"
    assert "nan" not in mark(BEYOND, unknown, 0.95).text


def test_the_matrix_has_a_row_per_statement_and_a_mark_per_layer(run: Path) -> None:
    record = read_run(run)
    rows = statement_matrix(record, page_kinds(record)[0])
    assert len({row.statement for row in rows}) == len(rows) == 2 + sum(not claim.unless and claim.score != EXCESS for claim in CLAIMS)
    assert [len(row.marks) for row in rows] == [1] + [2] * (len(rows) - 1)
    assert [m.state for m in rows[1].marks] == ["open", "settled"]  # FSS(S,T) - FSS(B,T): 0.01 +- 0.03 and 0.10 +- 0.03
    assert rows[-1].statement == "The maps of RS(S) − RS(B) are stronger than chance"
    summaries = [record.map_summaries[layer]["rs_student_minus_base"].above_null for layer in record.layers]
    assert [m.value for m in rows[-1].marks] == [f"{100 * (above or 0):.0f}%" for above in summaries]


def test_maps_that_are_as_strong_as_by_chance_are_not_settled(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", gallery=0)
    edit(folder / "scores.json", layers__layer1__maps__rs_student_minus_base__above_null=0.06)
    record = read_run(folder)
    assert [m.state for m in statement_matrix(record, page_kinds(record)[0])[-1].marks] == ["open", "settled"]


def test_a_run_of_an_older_version_has_no_row_for_what_it_does_not_know(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path / "run", gallery=0, score_maps=False))
    statements = [row.statement for row in statement_matrix(record, page_kinds(record)[0])]
    gain = next(claim for claim in CLAIMS if claim.score == GAIN)
    # The accuracy, the difference of FSS, RS(S) since there is no difference of RS, the four maps' scores and their balance.
    assert gain.above not in statements and len(statements) == 8


@pytest.mark.slow
def test_the_page_shows_the_opposite_and_reads_the_figures_aloud(tmp_path: Path, opened: Callable[..., Page]) -> None:
    folder = make_run(tmp_path / "run", gallery=0)
    edit(folder / "scores.json", **{"layers__layer3__scores__RS(S|B)": entry(-0.2, 0.05, 1.0)})
    write_page(folder)
    page = opened(folder)
    row = page.locator(".matrix tr", has_text="The student has relevance beyond the base")
    cell = row.locator("td").nth(1)
    assert cell.locator("svg.opposite").count() == 1 and cell.locator("[aria-hidden] >> text=−0.20").count() == 1
    words = "the opposite is settled. The student falls short of the base: RS(S|B) −0.20 (95% interval −0.25 to −0.15, p = 1.00)"
    assert cell.get_attribute("title") == cell.locator(".unseen").text_content() == words
    page.get_by_text("The same in words").click()
    assert "The student falls short of the base: the part" in page.locator(".words").inner_text()
