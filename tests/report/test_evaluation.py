"""The section with what `kdx evaluate` measured: its tables, its sentences, and its drawing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdx.report.evaluation import evaluation_section
from kdx.report.page import write_page
from kdx.runs import schema
from kdx.runs.evaluation import CandidateRecord, Evaluation, Measurement, MetricRecord, mean_interval, number_name, write_evaluation
from kdx.runs.record import RunRecord, read_run
from tests.made_runs import ODD_LAYER, SCRIPT, make_hostile_run, make_run

KINDS = {"rs_student": "run", "grad_cam_student": "other", "centre": "baseline"}


def evaluated(
    folder: Path, layers: tuple[str, ...], means: dict[str, float], better: str | None = "higher", title: str = "energy"
) -> RunRecord:
    """A run with the values of one metric around these means, by candidate."""
    run = read_run(folder)
    rng = np.random.default_rng(0)
    n = len(run.samples.ids)
    measurements, values = [], {}
    for name, mean in means.items():
        for layer in (None,) if KINDS[name] == "baseline" else layers:
            column = mean + 0.05 * rng.normal(size=n)
            values[number_name(layer, name, "energy")] = column
            measurements.append(Measurement("energy", name, layer, "", *mean_interval(column, 0.95), n, 0.0))
    metrics = {"energy": MetricRecord(title, "The share.", better, None, {"images": n})}
    candidates = {name: CandidateRecord(name if title == "energy" else SCRIPT, "A map.", KINDS[name]) for name in means}
    write_evaluation(run, Evaluation(tuple(measurements), metrics, candidates, values, 0.95))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; every test writes an evaluation of its own."""
    return make_run(tmp_path_factory.mktemp("evaluated") / "run", images=20, gallery=0)


@pytest.mark.parametrize(
    ("means", "better", "expected"),
    [
        ({"rs_student": 0.6, "centre": 0.4}, "higher", "better than the centre map"),
        ({"rs_student": 0.6, "centre": 0.4}, "lower", "worse than the centre map"),
        ({"rs_student": 0.3, "centre": 0.4}, "higher", "worse than the centre map"),
        ({"rs_student": 0.4, "centre": 0.4}, "higher", "not distinguishable from the centre map"),
        ({"rs_student": 0.4}, "higher", "The best of the run’s maps is rs_student"),
        ({"grad_cam_student": 0.4, "centre": 0.4}, "higher", ""),
        ({"rs_student": 0.6, "centre": 0.4}, None, ""),
    ],
)
def test_the_sentence_says_what_the_images_settle(run: Path, means: dict[str, float], better: str | None, expected: str) -> None:
    section = evaluation_section(evaluated(run, ("layer3",), means, better))
    assert section is not None and "20 images" in section.basis
    (block,) = section.blocks
    assert expected in block.statement and bool(block.statement) == bool(expected)
    assert len(block.tables) == (2 if better and "centre" in means else 1)


def test_tables_have_the_means_and_the_paired_differences(run: Path) -> None:
    record = evaluated(run, ("layer1", "layer3"), {"rs_student": 0.6, "grad_cam_student": 0.7, "centre": 0.4})
    section = evaluation_section(record)
    assert section is not None
    means, differences = section.blocks[0].tables
    assert [row[0].text for row in means.rows] == ["grad_cam_student", "rs_student", "centre (baseline)"]
    assert means.columns == ["Map", "layer1", "layer3"] and all(len(row) == 3 for row in means.rows)
    assert means.rows[2][1] == means.rows[2][2]  # a baseline is the same at every layer
    assert means.rows[1][2].value == pytest.approx(0.6, abs=0.05)
    assert [row[0].text for row in differences.rows] == ["grad_cam_student", "rs_student"]
    own, centre = means.rows[1][1].value, means.rows[2][1].value
    assert own is not None and centre is not None and differences.rows[1][1].value == pytest.approx(own - centre)


def test_the_drawing_is_sorted_and_repeatable(run: Path) -> None:
    record = evaluated(run, ("layer3",), {"rs_student": 0.6, "grad_cam_student": 0.7, "centre": 0.4})
    svg, again = (str(evaluation_section(record).blocks[0].svg) for _ in range(2))  # type: ignore[union-attr]
    assert svg == again
    assert re.findall(r">(rs_student|grad_cam_student|centre)<", svg) == ["grad_cam_student", "rs_student", "centre"]
    assert "var(--student)" in svg and "stroke-dasharray" in svg


def test_a_run_without_an_evaluation_has_no_section(run: Path) -> None:
    (run / schema.EVALUATION_FILE).unlink(missing_ok=True)
    assert evaluation_section(read_run(run)) is None
    assert 'id="evaluation"' not in write_page(run).read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=0, layers={ODD_LAYER: "layer4"})
    evaluated(folder, (ODD_LAYER,), {"rs_student": 0.6, "centre": 0.4}, title=SCRIPT)
    page = write_page(folder).read_text()
    assert 'id="evaluation"' in page and SCRIPT not in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_the_section_in_a_browser(width: int, tmp_path: Path, opened: Callable[..., Any]) -> None:
    """Nothing overflows the page, a table opens by keyboard, and drawings and tables have their buttons."""
    folder = make_hostile_run(tmp_path / "run")
    evaluated(folder, tuple(read_run(folder).layers), {"rs_student": 0.6, "grad_cam_student": 0.5, "centre": 0.4}, title=SCRIPT)
    write_page(folder)
    page = opened(folder, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#evaluation .plot .buttons button").all_inner_texts() == ["Save SVG", "Save PNG"]
    summary = page.locator("#evaluation summary").first
    summary.focus()
    page.keyboard.press("Enter")
    table = page.locator("#evaluation table").first
    assert table.is_visible() and table.locator("tbody tr").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.get_by_role("button", name="Copy CSV").first.is_visible()
