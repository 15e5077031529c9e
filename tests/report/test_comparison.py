"""Runs of several students side by side: the numbers are those of the runs, and the page shows all students on one scale."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page
from scipy import stats

import kdx
from kdx.choices import TableFormat
from kdx.commands.report import check_runs, compare, named_runs
from kdx.report.comparison import compare_runs, run_names
from kdx.report.comparison_page import write_comparison
from kdx.report.comparison_tables import drawings, score_tables, students_table
from kdx.report.comparison_text import joint_table
from kdx.runs import schema
from kdx.runs.record import read_run
from tests.made_runs import SCRIPT, edit, make_run

pytestmark = pytest.mark.slow  # most of these open a page in a browser

PAIRED = {"features.3": "layer1", "features.9": "layer3"}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of three students; the third has other layer names."""
    root = tmp_path_factory.mktemp("students")
    folders = {"kd": make_run(root / "kd" / "run", seed=0), "at": make_run(root / "at" / "run", seed=1)}
    folders["mobile"] = make_run(root / "mobile" / "run", seed=2, layers=PAIRED)
    for folder in folders.values():
        edit(
            folder / schema.MANIFEST,
            configuration__seed=0,
            configuration__models__teacher__sha256="t",
            configuration__models__base__sha256="b",
        )
    scores = json.loads((folders["at"] / schema.SCORES_FILE).read_text())
    scores["layers"]["layer1"]["scores"]["FSS(S,T)"]["value"] = 0.5
    (folders["at"] / schema.SCORES_FILE).write_text(json.dumps(scores))
    return folders


def test_runs_are_named_by_the_part_of_their_path_that_differs(tmp_path: Path) -> None:
    assert list(run_names([tmp_path / "demo/kd/run", tmp_path / "demo/at/run"])) == ["kd", "at"]
    assert list(run_names([tmp_path / "a", tmp_path / "b"])) == ["a", "b"]
    assert list(run_names([tmp_path / "x/a", tmp_path / "x/b", tmp_path / "y/a"])) == ["x/a", "x/b", "y/a"]
    assert list(named_runs([f"first={tmp_path}/a", f"{tmp_path}/b"])) == ["first", "b"]
    for runs in (["a", "a"], ["n=a", "n=b"]):
        with pytest.raises(kdx.KdxError, match=r"twice|named n"):
            named_runs(runs)


def test_every_number_of_the_tables_is_that_of_its_run(students: dict[str, Path]) -> None:
    comparison = compare_runs(students)
    assert list(comparison.layers) == ["layer1", "layer3"]  # the teacher's, since the students' names differ
    assert comparison.layers["layer3"] == ("layer3", "layer3", "features.9")
    for layer, table in zip(comparison.layers, score_tables(comparison), strict=True):
        assert table.columns == ("Score", "kd", "at", "mobile")
        for row in table.rows:
            for place, name in enumerate(students):
                run = read_run(students[name])
                own = comparison.layers[layer][place]
                entry = (run.scores[own or ""] | run.contrasts[own or ""])[row[0].text.replace(" − ", " - ")]
                assert (row[1 + place].value, row[1 + place].interval) == (entry.value, entry.interval)
    assert [drawing.title.split(":")[0] for drawing in drawings(comparison)][:1] == ["Similarity to the teacher"]
    assert drawings(comparison)[0].series[-1].label == "base: FSS(B,T)"  # all students have the same base


def test_accuracies_are_those_of_the_common_images_and_p_values_are_mcnemars(students: dict[str, Path], tmp_path: Path) -> None:
    comparison = compare_runs(students)
    right = {name: read_run(folder).samples.correct("student") for name, folder in students.items()}
    table = students_table(comparison)
    expected = []
    for name in ("at", "mobile"):
        only, other = int((right[name] & ~right["kd"]).sum()), int((right["kd"] & ~right[name]).sum())
        expected.append(stats.binomtest(only, only + other).pvalue)
    adjusted = [min(1, 2 * min(expected)), max(min(1, 2 * min(expected)), max(expected))]
    for row, name in zip(table.rows, students, strict=True):
        assert row[3].value == pytest.approx(right[name].mean())
    actual = [row[6].value for row in table.rows[1:]]
    assert actual == pytest.approx([adjusted[int(p != min(expected))] for p in expected])


def test_runs_with_other_images_are_compared_on_the_common_ones(students: dict[str, Path], tmp_path: Path) -> None:
    import pyarrow.parquet

    shorter = shutil.copytree(students["at"], tmp_path / "shorter")
    samples = pyarrow.parquet.read_table(shorter / schema.SAMPLES_FILE)
    pyarrow.parquet.write_table(samples.slice(10), shorter / schema.SAMPLES_FILE)
    edit(shorter / schema.MANIFEST, images__explained=30)
    comparison = compare_runs({"kd": students["kd"], "shorter": shorter})
    assert comparison.images == [f"image-{i:05d}" for i in range(10, 40)]
    assert any("30 images are common" in note for note in comparison.notes)
    page = write_comparison({"kd": students["kd"], "shorter": shorter}, tmp_path / "page.html").read_text()
    assert "30 images are common" in page and "image-00010" in page and "image-00009" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["0", "1", "x"]}, "different classes"),
        ({"configuration__fingerprint": "other"}, "different data"),
        ({"configuration__layers": {"layer1": "layer1"}}, ""),
        ({"configuration__target": "abc"}, "different targets"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    students: dict[str, Path], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    other = shutil.copytree(students["at"], tmp_path / "other")
    edit(other / schema.MANIFEST, **change)
    runs = {"kd": students["kd"], "other": other}
    if message:
        with pytest.raises(kdx.KdxError, match=message):
            compare_runs(runs)
    else:  # a layer that only one run has is shown for that run
        assert compare_runs(runs).layers == {"layer1": ("layer1", "layer1"), "layer3": ("layer3", None)}


def test_what_differs_between_runs_is_stated(students: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(students["at"], tmp_path / "other")
    edit(other / schema.MANIFEST, geometry="whole", configuration__models__teacher__sha256="u", configuration__seed=5)
    assert compare_runs(students).notes == []
    assert compare_runs({"kd": students["kd"], "other": other}).notes == [
        "The runs differ in geometry, batch and seed, which affects their numbers.",
        "The students have different teachers.",
    ]


def test_the_joint_table_has_every_run(students: dict[str, Path]) -> None:
    comparison = compare_runs(students)
    rows = list(csv.DictReader(io.StringIO(joint_table(comparison, "csv"))))
    for name, folder in students.items():
        own = list(csv.DictReader(io.StringIO(kdx.open_run(folder).table("csv"))))
        assert [{"student": name, **row} for row in own] == [row for row in rows if row["student"] == name]
    formats: tuple[tuple[TableFormat, str], ...] = (("markdown", r" \| "), ("latex", " & "))
    for format_, separator in formats:
        line = next(line for line in joint_table(comparison, format_).splitlines() if "FSS" in line and "layer1" in line)
        values = [cell.replace("$", "").split()[0] for cell in re.split(separator, line)[2:5]]
        expected = [
            run.scores[own or ""]["FSS(S,T)"].value for run, own in zip(comparison.runs.values(), comparison.layers["layer1"], strict=True)
        ]
        assert [float(value) for value in values] == pytest.approx(expected, abs=5e-4)
    with pytest.raises(kdx.KdxError, match="one run"):
        joint_table(comparison, "images")


def test_several_runs_make_a_page_or_a_table_without_a_choice_of_images(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for out, table, by, changes_images in (
        (None, None, None, False),
        (page, "csv", None, False),
        (page, None, None, True),
        (None, "csv", "class", False),
    ):
        with pytest.raises(kdx.KdxError, match=r"one page or one table|images of their pages|scores of classes"):
            check_runs(["a", "b"], out, table, by, changes_images=changes_images)  # type: ignore[arg-type]
    with pytest.raises(kdx.KdxError, match="several runs"):
        check_runs(["a"], page, None, None, changes_images=True)


def test_the_command_writes_the_page_and_prints_the_table(students: dict[str, Path], tmp_path: Path) -> None:
    runs = [f"{name}={folder}" for name, folder in students.items()]
    assert compare(runs, tmp_path / "new" / "page.html", None) == f"The page: {tmp_path / 'new' / 'page.html'}"
    assert (tmp_path / "new" / "page.html").read_text() == write_comparison(students, tmp_path / "again.html").read_text()
    assert compare(runs, None, "csv") == joint_table(compare_runs(students), "csv")


def opened_page(opened: Callable[..., Page], folders: dict[str, Path], target: Path, **options: object) -> Page:
    write_comparison(folders, target / "report.html")
    return opened(target, **options)


def test_the_page_shows_the_chosen_map_of_every_student_on_one_scale(
    students: dict[str, Path], tmp_path: Path, opened: Callable[..., Page]
) -> None:
    page = opened_page(opened, students, tmp_path)
    tiles = page.locator(".card").first.locator(".map")
    assert tiles.count() == 3
    assert [text.split(":")[0] for text in tiles.locator(".kind").all_text_contents()] == ["kd", "at", "mobile"]
    payload = json.loads(page.locator("#payload").text_content() or "")
    ids = page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.id)")
    for kind, label in (("rs_student", "RS(S)"), ("distilled", "distilled")):
        highest = []
        for folder, layer in zip(students.values(), ("layer3", "layer3", "features.9"), strict=True):
            run = read_run(folder)
            maps = run.maps(layer, kind, [int(run.samples.rows[run.samples.places[name]]) for name in ids])
            highest += [value for value in np.abs(maps).max((1, 2)) if value > 0]
        place = [known["label"] for known in payload["kinds"]].index(label)
        assert payload["limits"][1][place] == pytest.approx(np.quantile(highest, 0.95), rel=1e-4)
    # By keyboard: another layer and another kind of map.
    before = tiles.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")
    page.locator("[data-layer='1']").focus()
    page.keyboard.press("Enter")
    page.locator("[data-kind-button=distilled]").focus()
    page.keyboard.press("Space")
    assert page.locator("[data-kind-button][aria-pressed=true]").all_text_contents() == ["distilled"]
    assert tiles.locator("canvas").first.evaluate("canvas => canvas.toDataURL()") != before
    assert (page.locator("#meaning").text_content() or "").startswith("distilled at layer3")
    page.locator("[data-student-button='1']").click()
    assert tiles.count() == 2
    page.locator("#outcome").select_option("mixed")
    right = [read_run(folder).samples.correct("student")[[int(name[-5:]) for name in ids]] for folder in students.values()]
    mixed = int((np.any(right, 0) & ~np.all(right, 0)).sum())
    assert page.locator("#count").text_content() == f"Showing {min(8, mixed)} of {mixed} matching images."
    page.locator(".card:visible .enlarge").first.click()
    assert page.locator("#zoom-tiles .map").count() == 2


def test_the_strip_shows_the_images_on_which_the_students_differ_most(
    students: dict[str, Path], tmp_path: Path, opened: Callable[..., Page]
) -> None:
    page = opened_page(opened, students, tmp_path)
    payload = json.loads(page.locator("#payload").text_content() or "")
    ids = page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.id)")
    kind, opening = payload["kinds"][payload["kind"]]["label"], payload["layers"][payload["opening"]]
    assert kind == "RS(S) − RS(B)"
    sums, stable, filled = [], np.ones(len(ids), bool), np.ones(len(ids), bool)
    for name, folder in students.items():
        run = read_run(folder)
        layer = {"mobile": {own: known for known, own in PAIRED.items()}}.get(name, {}).get(opening, opening)
        places = [run.samples.places[image] for image in ids]
        maps = run.maps(layer, "rs_student_minus_base", [int(run.samples.rows[place]) for place in places])
        columns = run.map_columns(layer, "rs_student_minus_base")
        sums.append(maps.sum((1, 2), dtype=np.float64))
        filled &= np.abs(maps).max((1, 2)) > 0
        assert columns is not None
        stable &= columns.stability[places] >= 0.5
    spread = np.where(stable & filled, np.ptp(sums, 0), -1)
    expected = [ids[place] for place in np.argsort(-spread, kind="stable")[:6] if spread[place] >= 0]
    shown = page.locator(".stripitem .enlarge").all_text_contents()
    assert len(expected) == 6 and shown == [f"Enlarge {name}" for name in expected]
    captions = page.locator(".stripitem").first.locator(".kind").all_text_contents()
    assert [text.split(":")[0] for text in captions] == ["kd", "at", "mobile"]
    tops = [page.locator(name).first.evaluate("e => e.offsetTop") for name in (".strip", "#students", "#scores", "#cards", "#tables")]
    assert tops == sorted(tops)
    page.locator(".stripitem .enlarge").nth(1).click()
    assert (page.locator("#zoom-title").text_content() or "").endswith(expected[1])


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "light")])
def test_the_page_of_twenty_students_fits(tmp_path: Path, opened: Callable[..., Page], width: int, scheme: str) -> None:
    folders = {SCRIPT if i == 3 else f"student-{i}": make_run(tmp_path / str(i), seed=i, images=20, gallery=8) for i in range(20)}
    page = opened_page(opened, folders, tmp_path, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".card").first.locator(".map").count() == 20
    small = page.locator("button:visible").evaluate_all("all => all.filter((b) => b.getBoundingClientRect().height < 24).length")
    assert small == 0
