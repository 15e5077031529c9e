"""The gallery of the page in a real browser: what it shows, in which order, and what its maps look like."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page

from kdx.report.page import write_page
from tests.browser import saved
from tests.made_runs import KINDS, make_run
from tests.report.slow_maps import slow_resize, slow_scale

pytestmark = pytest.mark.slow  # most of these open a page in a browser

READ_PIXELS = """c => {
  const copy = new OffscreenCanvas(c.width, c.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(c, 0, 0);
  const data = copy.getImageData(0, 0, c.width, c.height).data;
  return [c.width, c.height, btoa(Array.from(data, b => String.fromCharCode(b)).join(""))];
}"""

SHOWN_FIRST = ["rs_student_minus_base", "rs_student", "rs_base", "distilled"]


def shown(page: Page) -> list[str]:
    ids: list[str] = page.eval_on_selector_all(".card", "cards => cards.filter(c => c.offsetParent !== null).map(c => c.dataset.id)")
    return ids


def samples(run: Path, gallery: int = 16) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.parquet.read_table(run / "samples.parquet").to_pylist()
    return rows[:gallery]


def stored(run: Path, layer: str, kind: str) -> NDArray[np.float64]:
    array = zarr.open_group(run / "maps.zarr", mode="r")[f"{layer}/{kind}"]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[:], dtype=np.float64)


def pixels(page: Page, card: int, kind: str) -> NDArray[np.int64]:
    """The pixels [height, width, 4] of a map's canvas."""
    width, height, text = page.locator(".card").nth(card).locator(f".map[data-kind={kind}] canvas").evaluate(READ_PIXELS)
    return np.frombuffer(base64.b64decode(text), np.uint8).astype(np.int64).reshape(height, width, 4)


def kinds_shown(page: Page) -> list[str]:
    names: list[str] = page.locator(".card").first.locator(".map").evaluate_all("all => all.map(m => m.dataset.kind)")
    return names


def test_filters_show_the_images_that_match(run: Path, opened: Callable[..., Page]) -> None:
    page, rows = opened(run), samples(run)

    def right(sample: dict[str, Any], role: str) -> bool:
        return bool(sample[f"{role}_prediction"] == sample["label"])

    assert shown(page) == [s["id"] for s in rows[:12]]
    page.get_by_role("button", name="Show 4 more").click()
    assert shown(page) == [s["id"] for s in rows]
    assert page.locator("#more").is_hidden()
    assert "Showing 16 of 16" in page.locator("#count").inner_text()

    outcomes: dict[str, Callable[[dict[str, Any]], bool]] = {
        "Student right": lambda s: right(s, "student"),
        "Student wrong": lambda s: not right(s, "student"),
        "Student right, base wrong": lambda s: right(s, "student") and not right(s, "base"),
        "Student wrong, teacher right": lambda s: right(s, "teacher") and not right(s, "student"),
    }
    for label, matches in outcomes.items():
        page.get_by_label("Predictions", exact=True).select_option(label=label)
        expected = [s["id"] for s in rows if matches(s)]
        assert 0 < len(expected) < 16, f"the synthetic run has no case for {label}"
        assert shown(page) == expected[:12]
        assert f"Showing {min(12, len(expected))} of {len(expected)} " in page.locator("#count").inner_text()

    page.get_by_label("Predictions", exact=True).select_option(label="All outcomes")
    page.get_by_label("Class").select_option(value="1")
    assert shown(page) == [s["id"] for s in rows if s["label"] == 1]

    # Both filters match no image in a class without such an image. A button resets them.
    empty_class = next(c for c in range(3) if all(right(s, "teacher") or not right(s, "student") for s in rows if s["label"] == c))
    page.get_by_label("Class").select_option(value=str(empty_class))
    page.get_by_label("Predictions", exact=True).select_option(label="Student right, teacher wrong")
    assert shown(page) == []
    page.get_by_role("button", name="Show all images").click()
    assert shown(page) == [s["id"] for s in rows[:12]]


def test_layer_buttons_draw_that_layers_maps(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    page.get_by_label("Scale of colours").select_option(label="Each map’s own")
    for kind in set(KINDS) - set(SHOWN_FIRST):
        page.locator(f"[data-kind-button={kind}]").click()
    for layer, grid in (("layer1", "16 × 16"), ("layer3", "8 × 8")):
        button = page.get_by_role("button", name=f"{layer} ({grid})", exact=True)
        button.focus()
        page.keyboard.press("Enter")  # the page works with the keyboard alone
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator("[data-layer][aria-pressed=true]").count() == 1
        for kind in KINDS:
            canvas = page.locator(".card").nth(1).locator(f".map[data-kind={kind}] canvas")
            assert canvas.get_attribute("aria-label") == f"{kind} map of image-00001 at {layer}"
            alpha = pixels(page, 1, kind)[..., 3]
            expected = 255 * slow_resize(slow_scale(stored(run, layer, kind)[1]), *alpha.shape)
            assert np.abs(alpha - expected).max() <= 1.01  # packing and drawing each round by up to one level
    # The synthetic run has one map that is zero everywhere.
    page.get_by_role("button", name="layer1").click()
    empty = page.locator(".card").first.locator(".map[data-kind=new]")
    assert empty.locator("figcaption").inner_text().split() == ["new", "empty", "map"]
    assert empty.locator("canvas").is_hidden()


@pytest.mark.parametrize("own", [True, False])
def test_a_signed_map_is_blue_below_zero_orange_above_and_transparent_at_zero(run: Path, opened: Callable[..., Page], own: bool) -> None:
    page, kind = opened(run), "rs_student_minus_base"
    maps = stored(run, "layer1", kind)[:16]  # the gallery
    limit = np.quantile(np.abs(maps).max((1, 2)), 0.95)
    if own:
        page.get_by_label("Scale of colours").select_option(label="Each map’s own")
    for image in (0, 5):
        drawn = pixels(page, image, kind)
        expected = np.clip(slow_resize(maps[image] / (np.abs(maps[image]).max() if own else limit), *drawn.shape[:2]), -1, 1)
        # Packing rounds by up to half of one of 127 levels of the map's own scale, and drawing by half of one of 255.
        assert np.abs(drawn[..., 3] - 255 * np.abs(expected)).max() <= 255 / 254 * (1 if own else np.abs(maps[image]).max() / limit) + 1
        red, blue = drawn[..., 0], drawn[..., 2]
        assert (red > blue + 100)[expected > 0.1].all() and (blue > red + 60)[expected < -0.1].all()
        assert (expected > 0.1).any() and (expected < -0.1).any()


def test_raw_cells_have_one_colour_each(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    page.get_by_role("button", name="layer3").click()
    page.get_by_label("Cells").select_option(label="Raw")
    drawn = pixels(page, 2, "rs_student")
    assert drawn.shape[:2] == (144, 144)
    cells = drawn.reshape(8, 18, 8, 18, 4)
    assert (cells == cells[:, :1, :, :1]).all()
    maps = stored(run, "layer3", "rs_student")[:16]
    limit = np.quantile(np.abs(maps).max((1, 2)), 0.95)
    assert np.abs(cells[:, 0, :, 0, 3] - 255 * np.minimum(np.abs(maps[2]) / limit, 1)).max() <= 3


def test_captions_have_the_sum_the_strength_and_the_stability(run: Path, opened: Callable[..., Page]) -> None:
    page, row = opened(run), samples(run)[3]
    caption = page.locator(".card").nth(3).locator(".map[data-kind=rs_student_minus_base] figcaption").inner_text().replace("\xa0", " ")
    total, strength, stability = (row[f"layer1/rs_student_minus_base/{name}"] for name in ("total", "strength", "stability"))
    assert float(caption.split("sum ")[1].split()[0].replace("−", "-")) == pytest.approx(total, rel=0.06)
    assert f"strength {strength:.1f}" in caption and f"stability {stability:.2f}" in caption
    distilled = page.locator(".card .map[data-kind=distilled] figcaption").all_inner_texts()
    assert not any("sum" in text for text in distilled)  # UniCAM's maps do not add up to a score
    weak = [row["layer1/distilled/strength"] <= 0.6 for row in samples(run)[:12]]  # 0.6 is the synthetic null
    assert ["(chance)" in text for text in distilled] == weak and any(weak)


def test_images_are_sorted_and_searched(run: Path, opened: Callable[..., Page]) -> None:
    page, rows = opened(run), samples(run)
    page.get_by_role("button", name="Show 4 more").click()

    def order(value: Callable[[dict[str, Any]], float]) -> list[str]:
        return [row["id"] for row in sorted(rows, key=value, reverse=True)][:12]

    def disagreement(row: dict[str, Any]) -> int:
        classes = [row[f"{role}_prediction"] for role in ("teacher", "base", "student")]
        return sum(bool(classes[i] != classes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    choose = page.get_by_label("Sort by").select_option
    choose("highest")
    assert shown(page) == order(lambda row: row["layer1/rs_student_minus_base/total"])
    assert "Sorted by sum of RS(S) − RS(B), highest first." in page.locator("#count").inner_text()
    choose("lowest")
    assert shown(page) == order(lambda row: -row["layer1/rs_student_minus_base/total"])
    choose("disagreement")
    assert shown(page) == order(disagreement) and len({disagreement(row) for row in rows}) > 1

    def wrong(row: dict[str, Any]) -> float:
        return float(row["student_confidence"] * (-1 if row["student_prediction"] == row["label"] else 1))

    def changed(row: dict[str, Any]) -> float:
        student, base = row["student_confidence"], row["base_confidence"]
        return float(abs(student - base) if row["student_prediction"] == row["base_prediction"] else student + base)

    numbers: dict[str, Callable[[dict[str, Any]], float]] = {"wrong": wrong, "changed": changed}
    for name, value in (numbers | {"confidence": lambda row: float(row["student_confidence"])}).items():
        choose(name)
        assert shown(page) == order(value)
    choose("stability")
    assert shown(page) == order(lambda row: row["layer1/rs_student_minus_base/stability"])
    choose("strength")
    for kind in ("rs_student_minus_base", "rs_student", "rs_base"):
        page.locator(f"[data-kind-button={kind}]").click()
    page.get_by_role("button", name="layer3").click()
    assert kinds_shown(page) == ["distilled"]
    assert shown(page) == order(lambda row: row["layer3/distilled/strength"])
    choose("")
    assert shown(page) == [row["id"] for row in rows][:12]
    page.get_by_label("Search by name").fill("0001")
    assert shown(page) == ["image-00001", *(f"image-0001{i}" for i in range(6))]


def test_the_address_restores_the_view(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    start = page.url
    page.get_by_role("button", name="layer3").click()
    page.get_by_label("Sort by").select_option("lowest")
    page.get_by_label("Cells").select_option("raw")
    page.get_by_label("Scale of colours").select_option("own")
    page.get_by_label("Search by name").fill("image-0000")
    page.locator("[data-kind-button=rs_base]").click()
    page.locator("[data-kind-button=new]").click()
    address, order, kinds = page.url, shown(page), kinds_shown(page)
    assert kinds == ["rs_student_minus_base", "rs_student", "distilled", "new"] and len(order) == 10
    other = opened(run)
    other.goto(address)
    other.reload()
    assert shown(other) == order and kinds_shown(other) == kinds
    assert other.locator("[data-layer][aria-pressed=true]").inner_text() == "layer3 (8 × 8)"
    assert other.get_by_label("Cells").input_value() == "raw"
    assert np.array_equal(pixels(other, 0, "new"), pixels(page, 0, "new"))
    other.get_by_role("link", name="Networks").click()
    other.wait_for_function("address => location.href === address", arg=address)  # a link to a section keeps the choices
    # An address with names that the page does not have opens the page as usual.
    other.goto(f"{start}#layer=nonsense&maps=new&sort=nonsense&outcome=%3Cb%3E")
    assert kinds_shown(other) == ["new"] and other.get_by_label("Sort by").input_value() == ""
    assert other.locator("[data-layer][aria-pressed=true]").inner_text() == "layer1 (16 × 16)"
    assert len(shown(other)) == 12


def test_an_image_is_enlarged_with_the_keyboard_and_saved(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    opener = page.locator(".card").nth(1).get_by_role("button", name="Enlarge image-00001")
    opener.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert "image-00001" in dialog.locator("h3").inner_text()
    assert dialog.locator(".map").evaluate_all("all => all.map(m => m.dataset.kind)") == SHOWN_FIRST
    assert dialog.locator("canvas").first.evaluate("c => c.width") == 480
    page.keyboard.press("ArrowRight")
    assert "image-00002" in dialog.locator("h3").inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # there is nothing before the first image
    assert "image-00000" in dialog.locator("h3").inner_text()
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Save PNG").click()
    assert download.value.suggested_filename == "image-00000.png"
    sheet = np.asarray(Image.open(download.value.path()).convert("RGB"))
    assert sheet.shape[1] == 16 + 4 * 336 and sheet.shape[0] > 2 * 320  # an image and four maps, in two rows
    assert len(np.unique(sheet[60:360, 360:670].reshape(-1, 3), axis=0)) > 1000  # the second tile is a map over the image
    page.keyboard.press("Escape")
    assert dialog.is_hidden()
    assert opener.evaluate("b => b === document.activeElement")


def test_the_figures_are_saved_as_a_table(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    page.get_by_label("Class").select_option(value="1")
    table = list(csv.DictReader(io.StringIO(saved(page, page.get_by_role("button", name="Save CSV")).decode())))
    chosen = [row for row in samples(run) if row["label"] == 1]
    assert len(table) == len(chosen) * 2 * 11
    for line in table:
        row = next(row for row in chosen if row["id"] == line["image"])
        assert float(line["confidence"]) == pytest.approx(row["student_confidence"], rel=1e-4)
        assert abs(float(line["wrong"])) == pytest.approx(row["student_confidence"], rel=1e-4)
        for name, column in (("sum", "total"), ("strength", "strength")):
            assert float(line[name]) == pytest.approx(row[f"{line['layer']}/{line['map']}/{column}"], rel=1e-4)


def test_the_strip_shows_the_highest_and_the_lowest_sums(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    rows = [row for row in samples(run) if row["layer1/rs_student_minus_base/stability"] >= 0.5]
    ids = [row["id"] for row in sorted(rows, key=lambda row: -row["layer1/rs_student_minus_base/total"])]
    names = [f"Enlarge {name}" for name in (*ids[:4], *ids[-2:])]
    assert page.locator(".stripitem .enlarge").all_text_contents() == names
    page.locator(".stripitem .enlarge").nth(4).click()
    assert ids[-2] in page.get_by_role("dialog").locator("h3").inner_text()
    # The strip and the table come before everything else.
    tops = [page.locator(name).first.evaluate("e => e.offsetTop") for name in (".strip", ".scores", ".matrix", ".cards")]
    assert tops == sorted(tops)


def test_a_run_without_score_maps_shows_unicams_maps(tmp_path: Path, opened: Callable[..., Page]) -> None:
    folder = make_run(tmp_path / "run", score_maps=False)
    write_page(folder)
    page = opened(folder)
    assert kinds_shown(page) == list(KINDS)
    sums = stored(folder, "layer3", "distilled")[:16].sum((1, 2))
    page.get_by_role("button", name="layer3").click()
    page.get_by_label("Sort by").select_option("strength")
    assert shown(page) == [f"image-{i:05d}" for i in np.argsort(-sums)[:12]]
    text = page.locator("body").inner_text()
    assert "add up to" not in text.replace("do not add up to a score", "") and "strength 1" not in text
    assert page.locator(".facts-of-maps").count() == 0


def test_the_difference_of_two_unicam_maps_has_the_diverging_colours(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    assert page.locator("#difference").is_hidden()
    for choice, kind in (("#plus", "distilled"), ("#minus", "residual")):
        page.locator(choice).select_option(kind)
    page.locator("#scale").select_option("own")
    page.locator("#cells").select_option("raw")
    first, second = (stored(run, "layer1", kind)[0] for kind in ("distilled", "residual"))
    expected = first / first.max() - second / second.max()
    actual = pixels(page, 0, "difference")
    cells = actual[:: actual.shape[0] // expected.shape[0], :: actual.shape[1] // expected.shape[1]][: len(expected), : expected.shape[1]]
    assert np.abs(cells[..., 3] / 255 - np.abs(expected)).max() < 0.02
    clear = np.abs(expected) > 0.3
    assert clear.any() and ((cells[..., 0] > cells[..., 2]) == (expected > 0))[clear].all()  # orange above zero, blue below
    assert page.locator("#difference").is_visible() and page.locator("#difference-high").inner_text() == "+1: only distilled"
    address = page.evaluate("location.hash")
    assert "plus=distilled" in address and "minus=residual" in address
    page.locator("#minus").select_option("distilled")  # a map minus itself is not shown
    assert page.locator("#difference").is_hidden() and "difference" not in kinds_shown(page)


def test_plots_are_saved_as_svg_and_png_with_the_colours_of_the_page(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    figure = page.locator("figure.plot").first
    text = saved(page, figure.get_by_text("Save SVG")).decode()
    assert text.startswith("<svg") and "stroke: rgb(" in text and "currentColor" not in "".join(re.findall('style="[^"]*"', text))
    with page.expect_download() as download:
        figure.get_by_text("Save PNG").click()
    picture = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    background = picture[0, 0]
    assert download.value.suggested_filename.endswith(".png") and (np.abs(picture - background).max(2) > 60).mean() > 0.002
