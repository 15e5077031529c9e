"""The sections "By class" and "By group" of a run's page."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kdx
from kdx.report.groups import group_plot, group_sections
from kdx.report.page import write_page
from kdx.runs import schema
from kdx.runs.evaluation import Evaluation, Measurement, write_evaluation
from kdx.runs.measured import Entry, GroupEntries
from kdx.runs.record import read_run
from kdx.runs.score_tables import main_scores
from tests.made_runs import SCRIPT
from tests.report.grouped_run import add_groups
from tests.report.test_gallery_page import shown as shown_images

if TYPE_CHECKING:
    from playwright.sync_api import Page

_CLASSES = ("sea", "maple $x$ tree", SCRIPT)


@pytest.fixture(scope="module")
def grouped(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grouped") / "run"
    shutil.copytree(run, folder)
    add_groups(folder, "classes", [*_CLASSES, *(f"class {number}" for number in range(37))], few=("class 0", "class 1"))
    add_groups(folder, "groups", ["rain", "snow"])
    return folder


def test_the_table_has_every_class_with_its_numbers_and_the_reason_for_a_missing_one(grouped: Path) -> None:
    record = read_run(grouped)
    by_class, by_group = group_sections(record, "layer3")
    assert [shown.opening for shown in by_class.layers] == [layer == "layer3" for layer in record.layers]
    names = main_scores(record)
    for section, layers in ((by_class, record.class_scores), (by_group, record.group_scores)):
        for shown in section.layers:
            for (head, images, *cells), (name, values) in zip(shown.table.rows, layers[shown.layer].items(), strict=True):
                assert (head.text, images.value) == (name, values.n)
                for cell, score in zip(cells, names, strict=True):
                    entry = values.entries.get(score)
                    assert (cell.value, cell.interval) == ((None, None) if entry is None else (entry.value, entry.interval))
    assert "3 images, and 5 are necessary. (2 classes)" in by_class.layers[0].table.note and not by_group.layers[0].table.note
    assert by_group.layers[0].table.columns[0] == "weather"
    assert "all 40 classes and 2 layers" in by_class.note


def test_the_plot_has_the_highest_value_first_and_fills_what_is_settled() -> None:
    def group(value: float, p_adjusted: float) -> GroupEntries:
        entry = Entry(value, (value - 0.1, value + 0.1), p_adjusted, p_adjusted)
        return GroupEntries(9, {}, {"RS(S|B) - RS(B|S)": entry}, {})

    groups = {"low": group(-0.5, 0.01), "high": group(0.5, 0.01), "open": group(0.2, 0.2), "none": GroupEntries(3, {}, {}, {})}
    svg = group_plot(groups, "RS(S|B) - RS(B|S)", "x", 0.95)
    assert [name for name in re.findall(r">([^<>]+)</text>", svg) if name in groups] == ["high", "open", "low"]
    fills = re.findall(r'<use [^>]*style="fill: ([^;"]+)[^>]*', svg)
    assert fills[-3:] == ["var(--student)", "var(--surface)", "var(--base)"]
    assert group_plot({}, "RS(S)", "x", 0.95).startswith("<svg")


def test_a_run_without_scores_per_class_says_why_and_an_old_run_has_no_section(run: Path) -> None:
    record = read_run(run)
    assert group_sections(record, "layer3") == []
    left_out = replace(record, stored_scores={**record.stored_scores, "left_out": {"classes": "The data has 1,000 classes."}})
    (section,) = group_sections(left_out, "layer3")
    assert (section.kind, section.layers, section.left_out) == ("class", [], "The data has 1,000 classes.")


@pytest.mark.slow
def test_the_page_escapes_names_and_states_why_there_are_no_scores(grouped: Path, run: Path, tmp_path: Path) -> None:
    page = write_page(grouped).read_text("utf-8")
    assert SCRIPT not in page and html.escape(SCRIPT) in page
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / schema.SCORES_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "left_out": {"classes": "The data has 1,000 classes."}}))
    page = write_page(tmp_path / "run").read_text("utf-8")
    assert "There are no scores per class. The data has 1,000 classes." in page and 'id="by-group"' not in page


@pytest.mark.slow
def test_images_are_sorted_by_the_share_of_a_map_inside_the_mask(run: Path, tmp_path: Path, opened: Callable[..., Page]) -> None:
    """`kdx evaluate` stored the share of each image, except of those without a mask, which come last."""
    shutil.copytree(run, tmp_path / "run")
    record = read_run(tmp_path / "run")
    shares = np.random.default_rng(4).random(len(record.samples.ids))
    shares[::3] = np.nan
    kind = next(kind for kind in record.map_kinds if kind == "rs_student_minus_base")
    measurement = Measurement("energy", kind, "layer1", "", float(np.nanmean(shares)), (0.1, 0.9), int(np.isfinite(shares).sum()), 0.0)
    write_evaluation(record, Evaluation((measurement,), {"energy": {}}, {measurement.number: shares}, 0.95))
    assert kdx.open_run(tmp_path / "run").sorted(f"layer1/{kind}/energy").images[0] == record.samples.ids[int(np.nanargmax(shares))]
    write_page(tmp_path / "run")
    page = opened(tmp_path / "run")
    page.goto((tmp_path / "run" / "report.html").as_uri() + f"#layer=layer1&maps={kind}&sort=inside")
    rows = schema.pictured_rows(tmp_path / "run")
    expected = sorted(rows, key=lambda row: -np.nan_to_num(shares[row], nan=-1.0))[:12]
    assert shown_images(page) == [record.samples.ids[row] for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_click_sorts_the_table(grouped: Path, opened: Callable[..., Page], width: int, scheme: str) -> None:
    write_page(grouped)
    page = opened(grouped, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    record = read_run(grouped)
    layer = next(iter(record.layers)) if page.locator("#by-class-0").is_visible() else list(record.layers)[1]
    table = page.locator(f"#by-class-{list(record.layers).index(layer)}")

    def column(place: int) -> list[str]:
        texts: list[str] = table.locator(f"tbody tr > :nth-child({place})").evaluate_all("cells => cells.map((c) => c.dataset.value ?? '')")
        return texts

    name = main_scores(record)[0]
    values = [values.entries[name].value for values in record.class_scores[layer].values() if name in values.entries]
    for reverse in (True, False):
        table.get_by_role("button", name=name, exact=True).click()
        assert list(map(float, filter(None, column(3)))) == sorted(values, reverse=reverse)
        assert column(3)[-2:] == ["", ""]  # no value
    table.get_by_role("button", name="Class", exact=True).press("Enter")
    first = table.locator("tbody th .value").first.inner_text()
    assert first == SCRIPT and table.locator("thead th").first.get_attribute("aria-sort") == "ascending"
