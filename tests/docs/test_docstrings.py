"""Docstrings as Markdown, for the API reference."""

from __future__ import annotations

from docs.docstrings import as_markdown


def test_formulas_survive() -> None:
    assert as_markdown("R = A - <A,B>/<B,B> B, and ``a*b``, `c_d`.") == "R = A - &lt;A,B>/&lt;B,B> B, and `a*b`, `c_d`."


def test_doctests_become_code_and_indented_formulas_stay() -> None:
    text = "One line.\n\n    a = b * c\n\n>>> 1 + 1\n2\n"
    assert as_markdown(text) == "One line.\n\n    a = b * c\n\n```pycon\n>>> 1 + 1\n2\n```"


def test_parameters_become_a_list_and_published_names_links() -> None:
    text = "Says x: not a parameter. a, b: two arrays, as in\n`kdx.fss`. c: a number; note: nothing."
    expected = "Says x: not a parameter.\n\n- **a, b**: two arrays, as in [`kdx.fss`][kdx.fss].\n- **c**: a number; note: nothing."
    assert as_markdown(text, {"a", "b", "c"}) == expected
