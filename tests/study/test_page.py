"""The page of a study: its numbers, its words, and what it does in a real browser."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page
from scipy import stats

from kdx.report.page import write_page as write_run_page
from kdx.runs.record import LostResult, read_run
from kdx.study.page import write_page
from kdx.study.table import CellStatus, Measurement, Study, read_study, write_plan, write_table
from tests.browser import beyond_the_window, out_of_reach, saved
from tests.study.made_studies import make_study


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of one student, of which the last is missing."""
    folder = make_study(tmp_path_factory.mktemp("small") / "study", chains=(("large", ()),), methods=("at",), seeds=3, missing=1)
    write_page(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_study(tmp_path_factory.mktemp("whole") / "study")
    write_page(folder)
    for cell in read_study(folder).cells[:2]:
        write_run_page(folder / cell.folder)
    return folder


def table(page: str, name: str) -> list[list[tuple[str, dict[str, float]]]]:
    """The rows of a table: the text of each cell and the numbers of its attributes."""
    body = page[page.index(f'<table id="{name}">') :]
    rows = re.findall(r"<tr>(.*?)</tr>", body[body.index("<tbody>") : body.index("</tbody>")], re.DOTALL)
    return [
        [
            (re.sub(r"<[^>]*>", "", text), {key: float(x) for key, x in re.findall(r'data-(\w+)="([^"]*)"', attributes)})
            for attributes, text in re.findall(r'<t[hd](?: scope="row")?([^>]*)><span class="value">(.*?)</span>', row)
        ]
        for row in rows
    ]


def values(study: Study, layer: str, score: str) -> list[float]:
    return [m.value for m in study.measurements if (m.layer, m.score) == (layer, score)]


def test_the_tables_have_the_means_and_intervals_of_the_seeds(small: Path) -> None:
    page, study = (small / "report.html").read_text(), read_study(small)
    rows = table(page, "scores-digits")
    names = ("FSS(S,T)", "FSS(B,T)", "RS(T)", "RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)")
    assert [row[1][0] for row in rows] == ["layer1", "layer3"]
    for row in rows:
        for name, (_, numbers) in zip(names, row[2:], strict=False):
            of_seeds = values(study, row[1][0], name)
            low, high = stats.t.interval(0.95, len(of_seeds) - 1, np.mean(of_seeds), stats.sem(of_seeds))
            assert numbers == {"value": pytest.approx(np.mean(of_seeds)), "low": pytest.approx(low), "high": pytest.approx(high)}
    (accuracy,) = table(page, "accuracy-digits")
    gain = np.subtract(values(study, "", "accuracy(student)"), values(study, "", "accuracy(base)"))
    assert accuracy[4][1]["value"] == pytest.approx(gain.mean())
    tests = table(page, "tests")
    likeness = np.subtract(values(study, "layer3", "FSS(S,T)"), values(study, "layer3", "FSS(B,T)"))
    (row,) = [row for row in tests if row[0][0] == "closer to the teacher" and row[2][0] == "layer3"]
    p = stats.ttest_1samp(likeness, 0).pvalue
    assert row[4][1]["value"] == pytest.approx(likeness.mean()) and row[6][1]["value"] == pytest.approx(p)
    assert row[7][1]["value"] >= row[6][1]["value"]


def test_the_page_says_what_is_missing_and_how_certain_it_is(small: Path, tmp_path: Path) -> None:
    page = (small / "report.html").read_text()
    assert "1 of 3 students are not part of this page: 1 not computed yet, 0 failed." in page
    assert "All 4 tests of this page are corrected together by Holm’s method" in page
    assert "with 2 seeds, a single uncorrected test finds a difference with 80% probability only if it is" in page
    assert "95% intervals over seeds (Student’s t)" in page and "There is one seed" not in page
    assert "RS(S|B) − RS(B|S) = −0.0" in page  # `at` fails at layer1
    folder = tmp_path / "study"
    shutil.copytree(small, folder)
    study = read_study(folder)
    kept = [m for m in study.measurements if m.cell == study.cells[0].key]
    status = {study.cells[0].key: CellStatus("complete"), study.cells[1].key: CellStatus("failed", "The <disk> is full.")}
    write_plan(folder, study.plan, study.cells, status)
    write_table(folder, study.cells, kept)
    page = write_page(folder).read_text()
    assert "There is one seed, so no difference is tested." in page and "There are no tests" in page and "over images" in page
    assert "1 not computed yet, 1 failed" in page and "failed: The &lt;disk&gt; is full." in page
    (row,) = [row for row in table(page, "scores-digits") if row[1][0] == "layer3"]
    (m,) = [m for m in kept if (m.layer, m.score) == ("layer3", "RS(S|B)")]
    assert row[7][1] == {"value": m.value, "low": m.low, "high": m.high}
    write_table(folder, study.cells, [])
    assert "0 students" in write_page(folder).read_text()


def test_the_page_is_the_same_for_the_same_study_and_complete(small: Path, tmp_path: Path) -> None:
    first = (small / "report.html").read_bytes()
    copy = tmp_path / "elsewhere"
    shutil.copytree(small, copy)
    (copy / ".report.html.123").write_bytes(b"part")
    assert write_page(copy).read_bytes() == first and not (copy / ".report.html.123").exists()
    text = first.decode()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-" in text
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//""", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert set(anchors) <= set(ids)
    shutil.rmtree(copy / read_study(copy).cells[0].folder / "maps.zarr")
    with pytest.raises(LostResult):
        write_page(copy)


# ---------------------------------------------------------------- in a browser

READ = "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; return btoa(String.fromCharCode(...d)); }"


def tiles(page: Page) -> list[str]:
    names: list[str] = page.locator("#tiles figure").evaluate_all("all => all.slice(1).map(figure => figure.getAttribute('aria-label'))")
    return names


def drawn(page: Page, student: str) -> Any:
    """The opacity [160, 160] of the map over the image of a student."""
    text = page.locator(f'#tiles figure[aria-label="{student}"] canvas').evaluate(READ)
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(160, 160, 4)[..., 3].astype(float)


@pytest.mark.slow
def test_the_maps_are_those_of_the_runs(whole: Path, opened: Callable[..., Page]) -> None:
    page, study = opened(whole), read_study(whole)
    page.get_by_label("Scale of colours").select_option(label="Each map’s own")
    page.get_by_label("Layer", exact=True).select_option(label="layer1")
    page.get_by_label("Map", exact=True).select_option(label="distilled")
    for step in range(2):
        for cell in study.cells[::15]:
            run = read_run(whole / cell.folder)
            (stored,) = run.maps("layer1", "distilled", [step])
            alpha = drawn(page, f"{' → '.join((cell.teacher, *cell.assistants, 'tiny'))}, {cell.method}, seed 0")
            scaled = (stored - stored.min()) / (stored.max() - stored.min())
            centres = alpha.reshape(8, 20, 8, 20)[:, 9:11, :, 9:11].mean((1, 3))
            assert np.abs(centres - 255 * scaled).max() <= 12  # the centre of a cell lies half a pixel beside a pixel's
        page.get_by_role("button", name="Next", exact=True).click()
    texts = page.locator("#tiles figure").nth(1).locator("figcaption").inner_text()
    run = read_run(whole / study.cells[0].folder)
    mark = "✓" if run.samples.correct("student")[2] else "✗"
    assert f"{mark} {run.class_name(int(run.samples.predictions['student'][2]))} " in texts


@pytest.mark.slow
def test_students_are_selected_by_keyboard(whole: Path, opened: Callable[..., Page]) -> None:
    page = opened(whole)
    labels = [
        f"{chain}, {method}, seed 0" for chain in ("small → tiny", "large → tiny", "large → middle → tiny") for method in ("kd", "at")
    ]
    assert tiles(page) == labels  # of one seed
    page.get_by_label("Method", exact=True).focus()
    page.keyboard.press("ArrowDown")
    assert tiles(page) == labels[::2]
    page.get_by_label("Seed", exact=True).select_option(label="All")
    page.get_by_label("Method", exact=True).select_option(label="All")
    assert len(tiles(page)) == 11 and "Showing 11 of 30 students." in page.locator("#count").inner_text()
    more = page.get_by_role("button", name="Show 11 more")
    more.focus()
    page.keyboard.press("Enter")
    assert len(tiles(page)) == 22
    assert page.evaluate("document.activeElement.textContent") == tiles(page)[11]
    page.get_by_label("Teacher", exact=True).select_option(label="large → middle")
    assert len(tiles(page)) == 10
    href = page.locator("#tiles a").first.get_attribute("href")
    assert href == "digits/large%2Bmiddle/tiny/kd/seed0/run/report.html"
    page.keyboard.press("Tab")
    assert out_of_reach(page) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_every_figure_is_saved_and_every_table_copied(whole: Path, opened: Callable[..., Page], width: int, scheme: str) -> None:
    page = opened(whole, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert beyond_the_window(page) == []
    plots = page.locator("figure.plot")
    assert plots.count() == 2 + 4 + 1 + 2 + 1 + 6
    assert [page.get_by_role("button", name=f"as {form}", exact=False).count() for form in ("SVG", "PNG")] == [plots.count()] * 2
    for place in range(0, plots.count(), 2):  # Chromium drops the eleventh download of a page that follows too soon
        svg = saved(page, plots.nth(place).get_by_role("button", name="as SVG")).decode()
        assert svg.startswith("<svg") and "currentColor" not in svg.split("</style>")[-1].split("style=")[0]
    with Image.open(io.BytesIO(saved(page, plots.nth(0).get_by_role("button", name="as PNG")))) as picture:
        assert picture.width == 1080
    page.reload()
    found = page.locator("figure.datatable")
    assert found.count() == 6
    for place in range(found.count()):
        each = found.nth(place)
        rows = list(csv.reader(io.StringIO(saved(page, each.get_by_role("button", name="Save CSV")).decode())))
        assert len(rows) == 1 + each.locator("tbody tr").count() and len({len(row) for row in rows}) == 1
        assert each.get_by_role("button", name="Copy LaTeX").count() == each.get_by_role("button", name="Copy CSV").count() == 1
    with Image.open(io.BytesIO(saved(page, page.locator("#save-png")))) as sheet:
        assert sheet.width > 1000
    assert saved(page, page.locator("#save-svg")).startswith(b"<svg")


@pytest.mark.slow
def test_the_size_of_a_teacher_is_not_that_of_an_assistant(whole: Path) -> None:
    """The teacher of a run with an assistant is the assistant."""
    page, study = (whole / "report.html").read_text(), read_study(whole)

    def where(m: Measurement) -> bool:
        return (m.layer, m.score) == ("layer3", "FSS(S,T)")

    assert "large (3.2 M)" in page and "800 k" not in page
    assert "The accuracy of T, FSS(S,T), FSS(B,T) and RS(T) then do not refer to the first teacher" in page
    small, large = (
        np.array([m.value for m in study.measurements if m.cell.startswith(f"digits/{teacher}/tiny/kd/") and where(m)])
        for teacher in ("small", "large")
    )
    slope = (large - small) / 4  # doublings
    rows = [row for row in table(page, "tests") if row[0][0] == "size of the teacher" and "kd" in row[1][0] and row[2][0] == "layer3"]
    assert [row[4][1]["value"] for row in rows] == [pytest.approx(slope.mean())]


@pytest.mark.slow
def test_a_student_links_to_its_page(whole: Path, opened: Callable[..., Page]) -> None:
    page = opened(whole)
    link = page.locator("#every-student a").first
    target = link.get_attribute("href")
    assert target is not None and (whole / target).is_file()


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 students with maps of 56 x 56 cells."""
    folder = tmp_path_factory.mktemp("hundred") / "study"
    make_study(folder, chains=(("small", ()), ("large", ())), methods=("kd", "at", "crd", "rkd", "dkd"), seeds=10, side=56)
    write_page(folder)
    return folder


@pytest.mark.slow
def test_a_page_of_100_students_stays_small_and_usable(hundred: Path, opened: Callable[..., Page]) -> None:
    assert (hundred / "report.html").stat().st_size < 15_000_000
    page = opened(hundred, width=400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.locator("#tiles canvas").count() == 10  # only what is shown is drawn
    page.get_by_label("Seed", exact=True).select_option(label="All")
    assert page.locator("#tiles canvas").count() == 11 and "of 100 students" in page.locator("#count").inner_text()
    seconds = (
        page.evaluate("() => { const t = performance.now(); document.getElementById('next').click(); return performance.now() - t; }")
        / 1000
    )
    assert seconds < 1
    payload = json.loads(page.locator("#payload").text_content() or "")
    (students,) = payload["sets"]
    height, width_, *_ = students["students"][0]["maps"][0][0][0][0]
    assert max(height, width_) < 56  # the maps are averaged down so that the page stays small
