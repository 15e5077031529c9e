"""The page of `kdx similarity`: its numbers and words, and what it does in a real browser."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

import kdx
from kdx.report.similarity_page import similarity_page
from kdx.runs.similarity import NetworkSimilarity
from tests.browser import beyond_the_window, out_of_reach, saved
from tests.made_runs import SCRIPT

LAYERS_A = (f"{SCRIPT} & 100%_x", "layer1", "features.stages.3.blocks.17.branch2.depthwise_convolution", "layer3")
LAYERS_B = ("stem", *(f"blocks.{place}" for place in range(13)), SCRIPT, "very_long_name_of_a_layer_without_any_place_to_break_" * 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, kdx.Similarity]:
    """A comparison of 4 x 16 layers given a third network, with hostile names."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(60, 4))
    a, b = ({name: shared + rng.normal(size=(60, 4)) for name in names} for names in (LAYERS_A, LAYERS_B))
    result = kdx.similarity(a, b, given={SCRIPT: shared[:, :2]})
    network = {"reference": f"models:{SCRIPT}", "trained": False, "parameters": 12345}
    about: dict[str, Any] = {
        "created": "2026-01-01T00:00:00Z",
        "data": SCRIPT,
        "split": SCRIPT,
        "projected": [["A", LAYERS_A[0]]],
        "lowered": 0.0123,
        "options": {"project": 2048},
    }
    left_out = (("A", SCRIPT, "it is constant: all images are equally far from each other."),)
    comparison = NetworkSimilarity(result, dict.fromkeys("ABC", network), left_out, about)
    folder = tmp_path_factory.mktemp("similarity")
    (folder / "report.html").write_text(similarity_page(comparison, ["kdx", "similarity", SCRIPT]), encoding="utf-8")
    return folder, result


def test_the_page_states_the_projection_and_is_complete(made: tuple[Path, kdx.Similarity]) -> None:
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    assert "At 1 layer the features were projected to 2,048 random numbers per image" in text and "3.1%" in text and "1.2%" in text
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//""", text) and SCRIPT not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


@pytest.mark.slow
def test_arrow_keys_read_the_cells(made: tuple[Path, kdx.Similarity], opened: Callable[..., Page]) -> None:
    folder, result = made
    page = opened(folder)
    figure = page.locator("figure.plot").first
    figure.locator("[tabindex='0']").first.focus()
    cell, reading = (0, 0), figure.locator(".readout")
    for key, step in (("ArrowRight", None), ("ArrowRight", (0, 1)), ("ArrowDown", (1, 0)), ("ArrowUp", (-1, 0)), ("ArrowUp", (0, 0))):
        page.keyboard.press(key)
        cell = cell if step is None else (cell[0] + step[0], cell[1] + step[1])
        value, low, high = (round(float(table[cell]), 3) for table in (result.values, result.low, result.high))
        text = reading.inner_text().replace("−", "-")
        names = f"{LAYERS_A[cell[0]]} of A, {LAYERS_B[cell[1]]} of B: "
        assert text.startswith(names)
        assert [float(number) for number in re.findall(r"-?\d\.\d+", text.removeprefix(names))] == [value, low, high]
    assert figure.locator("rect.current").count() == 1
    figure.locator("rect[data-row='2'][data-column='3']").hover()
    assert reading.inner_text().startswith(f"{LAYERS_A[2]} of A, {LAYERS_B[3]} of B: ")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_every_figure_is_saved_and_every_table_copied(
    made: tuple[Path, kdx.Similarity], opened: Callable[..., Page], width: int, scheme: str
) -> None:
    folder, result = made
    page = opened(folder, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert beyond_the_window(page) == []
    assert out_of_reach(page) == 0
    plots = page.locator("figure.plot")
    assert plots.count() == 3  # distance correlation, CKA and the partial correlation; the networks have no common diagonal
    for place in range(3):
        svg = saved(page, plots.nth(place).get_by_role("button", name="as SVG")).decode()
        assert svg.startswith("<svg") and svg.count("data-row=") == result.values.size and SCRIPT not in svg
        texts = re.findall(r"<text[^>]*>", svg)
        assert len(texts) > 20 and all("style=" in text and "fill: rgb(" in text for text in texts)  # the colours of the page as it looks
    with Image.open(io.BytesIO(saved(page, plots.first.get_by_role("button", name="as PNG")))) as picture:
        assert picture.width >= 1080
    tables = page.locator("figure.datatable")
    assert tables.count() == 1 + 3
    for place, expected in enumerate((None, result.values, result.cka, result.partial)):
        rows = list(csv.reader(io.StringIO(saved(page, tables.nth(place).get_by_role("button", name="Save CSV")).decode())))
        if expected is not None:
            assert [row[0] for row in rows[1:]] == list(LAYERS_A)
            columns = [place for place, name in enumerate(rows[0]) if name in LAYERS_B]
            assert np.array_equal(np.array([[float(row[column]) for column in columns] for row in rows[1:]]), expected)
        tables.nth(place).get_by_role("button", name="Copy LaTeX").click()
        assert tables.nth(place).get_by_role("button", name="Copy CSV").count() == 1
