"""The drawings of scores over epochs, and their section of the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page

from kdx.report.page import write_page
from kdx.report.plots import SIMILARITY_SERIES
from kdx.report.training_plots import training_drawings, training_plot
from kdx.runs.training_scores import TrainingScores, write_training_scores
from tests.made_runs import ODD_LAYER, make_run

SCORES = TrainingScores(
    128,
    [1, 2, 3, 4, 5],
    4,
    {
        "layer1": {"FSS(S,T)": [0.2, 0.1, 0.4, None, 0.8], "FSS(B,T)": [0.3] * 5, "RS(S)": [0.0, 0.1, 0.2, 0.3, 0.4]},
        ODD_LAYER: {"FSS(S,T)": [0.5, 0.4, 0.3, 0.2, 0.1], "FSS(B,T)": [0.3] * 5, "RS(S)": [-0.1, 0.1, 0.2, 0.3, 0.4]},
    },
)


def lines(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """The points of every line of this colour that has several."""
    paths = re.findall(rf'<path d="([^"]+)"[^>]*style="fill: none;[^"]*stroke: {re.escape(colour)}', svg)
    points = [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]
    return [each for each in points if len(each) > 2]


def test_points_are_placed_by_epoch_and_score() -> None:
    svg = training_plot(SCORES, SIMILARITY_SERIES[:2], "prefix", (0.0, 1.0))
    assert svg == training_plot(SCORES, SIMILARITY_SERIES[:2], "prefix", (0.0, 1.0))
    first, second = lines(svg, "var(--student)")
    assert len(first) == 4 and len(second) == 5  # a score that is not known is not drawn
    epochs, values = [1, 2, 3, 4, 5], np.array(SCORES.layers[ODD_LAYER]["FSS(S,T)"], float)
    x, y = np.array(second).T
    assert np.allclose(np.diff(x), (x[1] - x[0]) * np.diff(epochs), rtol=1e-4) and x[1] > x[0]
    scale = (y[-1] - y[0]) / (values[-1] - values[0])
    assert scale < 0 and np.allclose(y - y[0], scale * (values - values[0]), atol=1e-3)
    known = [0.2, 0.1, 0.4, 0.8]  # the panels have the same axes, one above the other
    assert np.allclose([point[1] - first[0][1] for point in first], scale * (np.array(known) - 0.2), atol=1e-3)
    assert [point[0] for point in first] == [x[0], x[1], x[2], x[4]] and first[0][1] < second[0][1]
    assert all(len({height for _, height in points}) == 1 for points in lines(svg, "var(--base)"))


def test_a_drawing_has_the_series_that_every_layer_has_and_the_colours_of_the_page() -> None:
    drawings = {drawing.title: drawing for drawing in training_drawings(SCORES)}
    assert {title: [line.score for line in drawing.series] for title, drawing in drawings.items()} == {
        "Similarity to the teacher (FSS)": ["FSS(S,T)", "FSS(B,T)"],
        "Relevance to the labels (RS)": ["RS(S)"],
    }
    svg = drawings["Similarity to the teacher (FSS)"].svg
    assert "&lt;b&gt;" in svg and "<b>" not in svg and "#0102" not in svg and "nan" not in svg.lower()
    assert ">epoch<" in svg and svg.count("currentColor") > 4


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (2, None), (300, 150)])
def test_any_number_of_epochs(count: int, kept: int | None) -> None:
    values: list[float | None] = [None] * count if kept is None else list(np.linspace(0.2, 0.9, count))
    scores = TrainingScores(None, list(range(1, count + 1)), kept, {"layer": {"FSS(S,T)": values}})
    (drawing,) = training_drawings(scores)
    assert drawing.svg.count("<use ") < 30 and "nan" not in drawing.svg.lower()


def test_the_page_shows_the_training_if_the_run_has_it(run: Path, tmp_path: Path) -> None:
    without = (run / "report.html").read_text()
    assert "Scores during training" not in without and "#training" not in without
    run = make_run(tmp_path / "run", images=8, gallery=2)
    write_training_scores(run, SCORES)
    text = write_page(run).read_text()
    assert "128 fixed validation images" in text and "epoch 4, whose weights were kept" in text
    assert text.count('href="#training"') == 1 and text.count('id="training"') == 1


@pytest.mark.slow
def test_the_section_in_a_browser(tmp_path: Path, opened: Callable[..., Page]) -> None:
    run = make_run(tmp_path / "run")
    write_training_scores(run, SCORES)
    write_page(run)
    for width, scheme in ((1280, "light"), (400, "dark")):
        page = opened(run, width, scheme)
        section = page.locator("#training")
        assert section.locator("figure").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colours = section.locator("figure").first.evaluate(
            "figure => [...figure.querySelectorAll('path')].map(path => getComputedStyle(path).stroke)"
        )
        glyph = section.locator(".glyph.student").first.evaluate("glyph => getComputedStyle(glyph).color")
        assert glyph in colours  # the key and the line have one colour
