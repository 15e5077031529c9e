"""The layout that all pages share, on a page of its own: saving figures, copying tables, and text that is an attack."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup
from PIL import Image
from playwright.sync_api import Page

from kdx.report.drawing import INK, LINES, WIDE, as_svg, page_colour, page_figure, style_axes
from kdx.report.layout import DataCell, DataTable, render
from tests.browser import saved

TEMPLATE = """{% extends "base.html.j2" %}
{% from "macros.html.j2" import data_table, plot_figure %}
{% block title %}{{ name }}{% endblock %}
{% block sections %}<li><a href="#main">Results</a></li>{% endblock %}
{% block header %}<h1>{{ name }}</h1>{% endblock %}
{% block main %}
{% call plot_figure("A line", svg, "a rising line", wide=true) %}<p>key</p>{% endcall %}
{{ data_table(table) }}{% endblock %}
{% block origin %}kdx {{ kdx }} wrote this page.{% endblock %}
"""

NAME = "</title><script>alert(1)</script> & 50%_x"

TABLE = DataTable(
    "scores",
    "Scores",
    ("layer", "RS(S) − RS(B)", "images"),
    [
        [DataCell(NAME), DataCell.of(-1 / 3, (-0.5, -0.1), sign=True), DataCell("1,200", value=1200)],
        [DataCell('b"2", c'), DataCell.of(math.nan), DataCell("–")],
    ],
    "A note.",
)


def drawing() -> str:
    with page_figure(120, WIDE) as figure:
        axes = figure.add_axes((0.1, 0.2, 0.8, 0.7))
        style_axes(axes, grid="y")
        for place, name in enumerate(LINES):
            axes.plot([0, 1], [place, place + 1], color=page_colour(name))
        axes.text(0, 0, "<b>", color=INK)
        return as_svg(figure, "line")


def write(folder: Path) -> str:
    (folder / "own.html.j2").write_text(TEMPLATE)
    (folder / "own.css").write_text("#main { outline: 3px solid rgb(1 2 3); }")
    (folder / "own.js").write_text('document.addEventListener("DOMContentLoaded", () => { document.title = asTex("a_b"); });\n')
    page = render(
        "own.html.j2", folder=folder, styles=["own.css"], scripts=["own.js"], kdx="1", name=NAME, svg=Markup(drawing()), table=TABLE
    )
    (folder / "report.html").write_text(page)
    return page


def test_a_page_is_the_same_for_the_same_content_and_escapes_text(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert page == write(tmp_path)
    assert NAME not in page and "<b>" not in page and "#0102" not in page
    assert all(f"stroke: var(--{name})" in page for name in LINES)
    with pytest.raises(jinja2.UndefinedError):
        render("own.html.j2", folder=tmp_path, kdx="1")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_figures_are_saved_and_tables_copied(tmp_path: Path, opened: Callable[..., Page], width: int, scheme: str) -> None:
    write(tmp_path)
    page = opened(tmp_path, width, scheme)
    assert page.title() == "a\\_b"  # the page's own script ran, with a function of the shared ones
    assert page.locator("#main").evaluate("e => getComputedStyle(e).outlineColor") == "rgb(1, 2, 3)"
    assert page.locator("h1").inner_text() == NAME
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    below = page.evaluate("""() => [".drawing", ".plot .buttons"].map((s) => document.querySelector(s).getBoundingClientRect())
      .map(({ top, bottom }) => [top, bottom])""")
    assert below[0][1] <= below[1][0], "the buttons lie over the drawing"

    svg = saved(page, page.get_by_role("button", name="Save the plot “A line” as SVG")).decode()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert svg.startswith("<svg") and "var(--" not in svg.split("style=")[1] and ground in svg
    with Image.open(io.BytesIO(saved(page, page.get_by_role("button", name="Save the plot “A line” as PNG")))) as picture:
        assert picture.size == (3 * WIDE, 360)

    rows = list(csv.reader(io.StringIO(saved(page, page.get_by_role("button", name="Save CSV of the table “Scores”")).decode("utf-8"))))
    assert rows == [
        ["layer", "RS(S) − RS(B)", "RS(S) − RS(B) low", "RS(S) − RS(B) high", "images"],
        [NAME, repr(-1 / 3), "-0.5", "-0.1", "1200"],
        ['b"2", c', "nan", "", "", "–"],
    ]
    page.evaluate("navigator.clipboard && Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    button = page.get_by_role("button", name="Copy LaTeX of the table “Scores”")
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("textarea").input_value().splitlines() == [
        "\\begin{tabular}{lrr}",
        "\\toprule",
        "layer & RS(S) $-$ RS(B) & images \\\\",
        "\\midrule",
        "\\textless{}/title\\textgreater{}\\textless{}script\\textgreater{}alert(1)\\textless{}/script\\textgreater{} \\& 50\\%\\_x "
        "& $-$0.333 ($-$0.500 to $-$0.100) & 1,200 \\\\",
        'b"2", c & -- & -- \\\\',
        "\\bottomrule",
        "\\end{tabular}",
    ]
    assert page.locator("textarea").evaluate("area => area.selectionEnd - area.selectionStart") > 100
