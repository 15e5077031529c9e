"""The page in a real browser, the words against hand-made numbers, the pictures against a slow formula."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console

from kdx.errors import KdxError
from kdx.report import gallery, overlays, plots, wording
from kdx.report import page as page_module
from kdx.report.page import script_json, write_page
from kdx.report.tables import TABLES
from kdx.report.terminal import scores_table
from kdx.roles import BALANCE, CONTRASTS, LIKENESS, MAPS, READING_ORDER, SCORES
from kdx.runs.record import Entry
from kdx.runs.schema import layer_file_names
from kdx.scores import uncertainty
from tests.made_runs import KINDS, edit, entry, make_run

HOSTILE = "<script>alert(1)</script>"
READ_ALPHA = """c => {
  const copy = new OffscreenCanvas(c.width, c.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(c, 0, 0);
  return [c.width, c.height, ...copy.getImageData(0, 0, c.width, c.height).data.filter((_, i) => i % 4 === 3)];
}"""
ODD = "block/<b>&\"$x^2$ ü--'.9"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser here: looked for {', '.join(names)}")
    with sync_playwright() as playwright:
        held = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
        )
        yield held
        held.close()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("plain") / "run")
    write_page(folder)
    return folder


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every name is an attack, or far too long, or both."""
    long = "features." + "denseblock4_denselayer16_" * 6
    folder = make_run(
        tmp_path_factory.mktemp("hostile") / "run",
        classes=(HOSTILE, "</title><img src=x onerror=alert(2)>", "a\u2028b--><!--", "w" * 150),
        layers={ODD: "<i>layer4</i>", long: long},
        images=16,
        gallery=8,
        size=(48, 30),
    )
    ids = [f"</script><script>alert({i})</script>{'x' * 90}" for i in range(16)]
    table = pa.parquet.read_table(folder / "samples.parquet")
    pa.parquet.write_table(table.set_column(table.column_names.index("id"), "id", pa.array(ids)), folder / "samples.parquet")
    edit(
        folder / "manifest.json",
        method="<u>kd</u>",
        command=["kdx", HOSTILE, "it's"],
        configuration__data=HOSTILE,
        configuration__models__teacher__reference="timm:" + "r" * 200 + HOSTILE,
        images__unreadable=[{"id": HOSTILE, "reason": "bad \ud800 <b>bytes</b>"}],
        environment__processor=HOSTILE,
    )
    write_page(folder)
    return folder


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page and, at the end, holds it to: no message, no alert, no error, no request but the page's own."""
    pages: list[tuple[Page, str, list[str]]] = []

    def open_(run: Path, width: int = 1280, scheme: Any = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        address, heard = (run / "report.html").as_uri(), list[str]()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda request: heard.append(f"request: {request.url}") if _leaves(request.url, address) else None)
        # Told to the console: a dialog would be dismissed unseen.
        page.add_init_script("window.alert = (text) => console.log(`alert ${text}`);")
        page.goto(address)
        pages.append((page, address, heard))
        return page

    yield open_
    for page, address, heard in pages:
        assert heard == []
        assert page.url.split("#")[0] == address
        page.close()


def _leaves(url: str, address: str) -> bool:
    return url != address and not url.startswith("data:")


def _shown(page: Page) -> list[str]:
    ids: list[str] = page.eval_on_selector_all(".card", "cards => cards.filter(c => c.offsetParent !== null).map(c => c.dataset.id)")
    return ids


def _samples(run: Path, gallery: int = 16) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.parquet.read_table(run / "samples.parquet").to_pylist()
    return rows[:gallery]


# ---------------------------------------------------------------- the page


def test_filters_show_what_the_samples_say(run: Path, opened: Callable[..., Page]) -> None:
    page, samples = opened(run), _samples(run)

    def right(sample: dict[str, Any], role: str) -> bool:
        return bool(sample[f"{role}_prediction"] == sample["label"])

    assert _shown(page) == [s["id"] for s in samples[:12]]
    page.get_by_role("button", name="Show 4 more").click()
    assert _shown(page) == [s["id"] for s in samples]
    assert page.locator("#more").is_hidden()
    assert "Showing 16 of 16" in page.locator("#count").inner_text()

    outcomes: dict[str, Callable[[dict[str, Any]], bool]] = {
        "Student right": lambda s: right(s, "student"),
        "Student wrong": lambda s: not right(s, "student"),
        "Student right, base wrong": lambda s: right(s, "student") and not right(s, "base"),
        "Student wrong, teacher right": lambda s: right(s, "teacher") and not right(s, "student"),
    }
    for label, fits in outcomes.items():
        page.get_by_label("Predictions", exact=True).select_option(label=label)
        expected = [s["id"] for s in samples if fits(s)]
        assert 0 < len(expected) < 16, f"the synthetic run has no case for {label}"
        assert _shown(page) == expected[:12]
        assert f"Showing {min(12, len(expected))} of {len(expected)} " in page.locator("#count").inner_text()

    page.get_by_label("Predictions", exact=True).select_option(label="All outcomes")
    page.get_by_label("Class").select_option(value="1")
    assert _shown(page) == [s["id"] for s in samples if s["label"] == 1]

    # Both filters together, in a class without such an image: the empty state, and the way back.
    bare = next(c for c in range(3) if all(right(s, "teacher") or not right(s, "student") for s in samples if s["label"] == c))
    page.get_by_label("Class").select_option(value=str(bare))
    page.get_by_label("Predictions", exact=True).select_option(label="Student right, teacher wrong")
    assert _shown(page) == []
    page.get_by_role("button", name="Show all images").click()
    assert _shown(page) == [s["id"] for s in samples[:12]]


def test_layer_buttons_draw_that_layers_maps(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    group = zarr.open_group(run / "maps.zarr", mode="r")
    for layer in ("layer1", "layer3"):
        button = page.get_by_role("button", name=layer, exact=True)
        button.focus()
        page.keyboard.press("Enter")  # the keyboard is enough
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator("[data-layer][aria-pressed=true]").count() == 1
        for kind in KINDS:
            array = group[f"{layer}/{kind}"]
            assert isinstance(array, zarr.Array)
            canvas = page.locator(".card").nth(1).locator(f".map[data-kind={kind}] canvas")
            assert canvas.get_attribute("aria-label") == f"{kind} features of image-00001 at {layer}"
            drawn = np.array(canvas.evaluate(READ_ALPHA))
            alpha = drawn[2:].reshape(drawn[1], drawn[0])
            expected = 255 * _slow_resize(_slow_scale(np.asarray(array[1])), drawn[1], drawn[0])
            assert np.abs(alpha - expected).max() <= 1.01  # a byte from the packing, a byte from the drawing
    # The synthetic run has one map that is zero everywhere.
    page.get_by_role("button", name="layer1", exact=True).click()
    empty = page.locator(".card").first.locator(".map[data-kind=new]")
    assert empty.locator("figcaption").inner_text() == "new: nothing here"
    assert empty.locator("canvas").is_hidden()


def test_opacity_theme_and_command(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    page.get_by_label("Map opacity").fill("35")
    assert page.locator("canvas").first.evaluate("c => getComputedStyle(c).opacity") == "0.35"
    theme = page.get_by_role("button", name="Dark")
    assert theme.get_attribute("aria-pressed") == "false"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    theme.click()
    assert theme.get_attribute("aria-pressed") == "true"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.reload()
    assert theme.get_attribute("aria-pressed") == "true"
    assert page.locator("#command").inner_text() == "kdx explain digits --models 'models file.json' --out run"
    page.get_by_role("button", name="Copy").click()
    page.get_by_text(re.compile("Command (copied|selected)")).wait_for(state="attached")


def test_a_right_answer_is_told_by_more_than_colour(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    for place, sample in enumerate(_samples(run)[:12]):
        said = page.locator(".card").nth(place).locator(".verdicts tr").all_text_contents()
        for role, line in zip(("teacher", "base", "student"), said, strict=True):
            right = sample[f"{role}_prediction"] == sample["label"]
            assert line.split()[:2] == [role, "✓right" if right else "✗wrong"]


def test_page_is_labelled(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    lost = page.evaluate("""() => {
      const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
      const anchors = [...document.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute('href').slice(1));
      return {
        unlabelled: [...document.querySelectorAll('select, input')].filter(e => !e.labels.length).length,
        noalt: [...document.querySelectorAll('img')].filter(e => !e.hasAttribute('alt')).length,
        nameless: [...document.querySelectorAll('button')].filter(e => !e.textContent.trim()).length,
        twice: ids.filter((id, i) => ids.indexOf(id) !== i),
        dangling: anchors.filter(id => !ids.includes(id)),
        references: [...document.querySelectorAll('use')].map(u => (u.getAttribute('href') || u.getAttribute('xlink:href')).slice(1))
          .filter(id => !ids.includes(id)),
        titles: document.querySelectorAll('h1').length,
      };
    }""")
    assert lost == {"unlabelled": 0, "noalt": 0, "nameless": 0, "twice": [], "dangling": [], "references": [], "titles": 1}


@pytest.mark.parametrize("width", [400, 320])
def test_no_horizontal_overflow(run: Path, hostile: Path, pair: Path, opened: Callable[..., Page], width: int) -> None:
    for folder in (run, hostile, pair):
        page = opened(folder, width=width)
        page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Nothing may be cut off in silence either: whatever stands wider than the window must scroll within itself.
        beyond = page.evaluate(
            "() => [...document.querySelectorAll('main *, header *, footer *')].filter(e => e.getClientRects().length && "
            "!e.closest('.unseen, thead, svg') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"
        )
        assert beyond == []


def test_hostile_names_are_text(hostile: Path, opened: Callable[..., Page]) -> None:
    page = opened(hostile)  # a dialog, an error or a request fails in the fixture
    assert page.locator(".card h3").first.inner_text() == HOSTILE
    assert page.locator(".card .id").first.inner_text().startswith("</script><script>alert(0)")
    assert page.locator("h3.layer").first.inner_text() == ODD
    assert page.locator("[data-layer]").first.inner_text() == ODD
    assert page.locator("#command").inner_text() == f"kdx '{HOSTILE}' 'it'\"'\"'s'"
    assert page.locator("main :is(b, i, u):has-text('bytes'), main i:has-text('layer4'), header u").count() == 0
    assert page.locator("script").count() == 2
    assert len(_shown(page)) == 8
    page.get_by_role("button", name=ODD).click()
    assert page.locator("canvas").first.get_attribute("aria-label") == f"distilled features of {_samples(hostile)[0]['id']} at {ODD}"


def test_hostile_layers_have_plain_file_names(hostile: Path) -> None:
    written = {path.name for path in (hostile / "overlays").glob("00000_*.png")}
    assert len(written) == 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) for name in written)
    # Names that one file system or another would merge stay apart.
    assert len({name.lower() for name in layer_file_names(["a/b", "a-b", "a:b", "A-B", "..", "con", ""]).values()}) == 7


def test_page_policy_and_size(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-" in page
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//""", page)
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)
    assert len(page) < 600_000
    first = (run / "report.html").read_bytes()
    write_page(run)
    assert (run / "report.html").read_bytes() == first
    assert not list(run.glob(".*")) and not list((run / "overlays").glob(".*"))


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "\u2028\u2029", "&lt;", "é\ud800"])
def test_script_json_is_safe_and_exact(text: str) -> None:
    written = script_json({text: [text]})
    assert json.loads(written) == {text: [text]}
    assert not set("<>&") & set(written)
    assert written.isascii()


def test_colours_have_contrast() -> None:
    """Text at 4.5 to 1 on every ground it stands on, in both themes (WCAG AA)."""
    style = (Path(page_module.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", block)) for block in re.findall(r"color-scheme: \w+;(.*?)}", style, re.DOTALL)
    ]
    assert len(themes) == 3
    assert themes[1] == themes[2]

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in themes:
        for ink, least in (
            ("ink", 7),
            ("muted", 4.5),
            ("right", 4.5),
            ("wrong", 4.5),
            ("teacher", 3),
            ("base", 3),
            ("student", 3),
            ("control", 3),
        ):
            for ground in ("page", "surface", "sunk"):
                light, dark = sorted((luminance(theme[ink]), luminance(theme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (ink, ground)


def test_without_pictures_and_with_unreadable_images(tmp_path: Path, opened: Callable[..., Page]) -> None:
    folder = make_run(tmp_path / "run", gallery=0, layers={"layer1": "layer1"}, images=8)
    edit(folder / "manifest.json", images__unreadable=[{"id": "broken.png", "reason": "truncated"}], method=None)
    shutil.rmtree(folder / "overlays")
    write_page(folder)
    page = opened(folder)
    assert "kept no pictures" in page.locator("#gallery .empty").inner_text()
    page.get_by_text("1 image could not be read and is in none of the numbers").click()
    assert "broken.png truncated" in page.locator(".unreadable li").inner_text()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a teacher."""
    folder = make_run(tmp_path_factory.mktemp("pair") / "run", teacher=False)
    write_page(folder)
    return folder


def test_without_a_teacher_nothing_speaks_of_one(pair: Path, opened: Callable[..., Page]) -> None:
    page = opened(pair)
    text = page.locator("body").inner_text()
    names = "FSS", "T | S", "S | T", "RS(T", "|T)", "missed", "eacher"
    assert [name for name in names if name in text.replace("On Explaining Knowledge Distillation", "")] == []
    assert page.locator("h1").inner_text() == "What sets the student apart from the base"
    assert page.locator(".network h3").all_inner_texts() == ["Base", "Student"]
    assert page.locator(".plot").count() == 2 and page.locator("table.scores").count() == 2 and page.locator("table.pairs").count() == 0
    assert page.locator(".kinds dt").all_inner_texts() == ["Distilled S | B", "Residual B | S"]
    assert page.locator(".card").first.locator(".map").evaluate_all("all => all.map(m => m.dataset.kind)") == ["distilled", "residual"]
    assert page.locator("#outcome option").count() == 5
    assert page.locator(".card").first.locator(".verdicts tr th").all_inner_texts() == ["base", "student"]
    assert {path.stem.split("_")[-1] for path in (pair / "overlays").glob("*_*.png")} == {"distilled", "residual"}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(scores_table(pair))
    table = console.export_text()
    assert "RS(S|B) − RS(B|S)" in table and "T" not in table


def test_random_weights_are_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=0)
    edit(folder / "manifest.json", random_weights=["base"])
    page = write_page(folder).read_text()
    assert page.count("Its weights are random") == 1
    assert "trained without the teacher. Its weights are random, wholly or in part." in page


def test_salient_features_are_said_wherever_scores_are_read(tmp_path: Path, opened: Callable[..., Page]) -> None:
    folder = make_run(tmp_path / "run")
    edit(folder / "manifest.json", configuration__features={"kind": "salient", "keep": 0.5, "noise": 0.0})
    write_page(folder)
    page = opened(folder, width=400)
    said = "the top 50% of pixels by HiResCAM kept, the rest imputed"
    assert page.locator(".basis").inner_text().endswith(f"The scores are of salient features: {said}.")
    assert said in page.locator(".definitions").inner_text() and said in page.locator(".cautions li").first.inner_text()
    assert page.locator(".legend .note").inner_text().endswith("The maps are of whole images; the scores are of salient features.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert str(scores_table(folder).title) == "Scores of salient features with 95% intervals"


@pytest.mark.parametrize(
    ("keep", "noise", "said"),
    [
        (0.5, 0.0, "the top 50% of pixels by HiResCAM kept, the rest imputed"),
        (0.125, 0.01, "the top 12.5% of pixels by HiResCAM kept, the rest imputed with noise of standard deviation 0.01"),
    ],
)
def test_what_a_salient_image_is_in_words(keep: float, noise: float, said: str) -> None:
    assert wording.kept_pixels(keep, noise) == said


# ---------------------------------------------------------------- the pictures


def _slow_scale(map_: NDArray[Any]) -> NDArray[np.float64]:
    low, high = float(map_.min()), float(map_.max())
    return np.array([[(float(x) - low) / (high - low) if high > low else 0.0 for x in line] for line in map_])


def _slow_resize(map_: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear, one place at a time, from the definition: pixel centres aligned, edges held."""
    out = np.empty((height, width))
    h, w = map_.shape
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            total = 0.0
            for p in {math.floor(y), math.ceil(y)}:
                for q in {math.floor(x), math.ceil(x)}:
                    weight = max(0.0, 1 - abs(y - p)) * max(0.0, 1 - abs(x - q))
                    total += weight * map_[p, q]
            out[i, j] = total
    return out


def test_composites_follow_the_formula(hostile: Path) -> None:
    layer = ODD
    name = layer_file_names(list(json.loads((hostile / "manifest.json").read_text())["configuration"]["layers"]))[layer]
    array = zarr.open_group(hostile / "maps.zarr", mode="r")[f"{layer}/residual"]
    assert isinstance(array, zarr.Array)
    image = np.asarray(Image.open(hostile / "overlays" / "00003.png").convert("RGB"))
    large = np.repeat(np.repeat(image, 3, axis=0), 3, axis=1)  # 48 pixels to 144
    value = _slow_resize(_slow_scale(np.asarray(array[3])[::2, ::2]), *large.shape[:2])
    expected = np.empty_like(large)
    table = overlays.colours()
    for i, j in itertools.product(*map(range, value.shape)):
        a = float(overlays.OPACITY * value[i, j])
        for c in range(3):
            expected[i, j, c] = round((1 - a) * float(large[i, j, c]) + a * float(table[round(255 * value[i, j]), c]))
    drawn = overlays.composite(large, overlays.scaled_for_display(np.asarray(array[3])[::2, ::2]))
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1
    whole = np.asarray(Image.open(hostile / "overlays" / f"00003_{name}_residual.png"))
    assert np.array_equal(whole, overlays.composite(large, overlays.scaled_for_display(np.asarray(array[3]))))


def test_scaled_keeps_zero_and_never_divides_by_nothing() -> None:
    maps = np.zeros((4, 3, 5), np.float32)
    maps[1] = 7
    maps[2, 1, 2] = np.nan
    maps[3] = np.arange(15, dtype=np.float32).reshape(3, 5) * 1e-30
    out = overlays.scaled_for_display(maps)
    assert not out[:3].any()
    assert out[3].min() == 0 and out[3].max() == 1
    assert np.array_equal(overlays.composite(np.full((6, 6, 3), 9, np.uint8), out[0]), np.full((6, 6, 3), 9, np.uint8))


def test_large_maps_and_images_are_made_small() -> None:
    rng = np.random.default_rng(0)
    packed = gallery._packed(rng.random((130, 65)).astype(np.float32))
    assert packed is not None and packed[:2] == (64, 32)
    photo = Image.fromarray(rng.integers(0, 255, (400, 700, 3), dtype=np.uint8))
    assert gallery._shrunk(photo).size == (320, 183)
    assert gallery._data_uri(gallery._shrunk(photo)).startswith("data:image/jpeg")
    assert gallery._data_uri(photo.crop((0, 0, 32, 32))).startswith("data:image/png")


def test_plot_takes_colours_from_the_page_and_text_as_text() -> None:
    points = {"a<b>$x$ &": {"FSS(S,T)": (0.5, (0.4, 0.6)), "FSS(B,T)": (math.nan, (math.nan, math.nan))}}
    svg = plots.plot(points, plots.SIMILARITY, "one")
    assert svg == plots.plot(points, plots.SIMILARITY, "one")
    assert "a&lt;b&gt;$x$ &amp;" in svg
    assert "var(--student)" in svg and "currentColor" in svg and "#0102" not in svg
    assert "NaN" not in svg and "nan" not in svg


def _points(*values: float, half: float = 0.01) -> dict[str, dict[str, tuple[float, tuple[float, float]]]]:
    return {"layer": {name: (x, (x - half, x + half)) for name, x in zip(("FSS(S,T)", "FSS(B,T)"), values, strict=True)}}


@pytest.mark.parametrize(
    ("values", "zero"), [((0.92, 0.89), False), ((0.9, 0.5), False), ((0.9, 0.4), True), ((0.3, -0.2), True), ((-0.1, -0.2), True)]
)
def test_an_axis_holds_its_intervals_and_zero_unless_they_would_be_lost_on_it(values: tuple[float, float], zero: bool) -> None:
    points = _points(*values)
    low, high = plots.limits(points, plots.SIMILARITY, from_zero=False)
    assert low < min(values) - 0.01 and high > max(values) + 0.01
    assert (low <= 0 <= high) == zero
    assert zero or max(values) - min(values) + 0.02 > 0.45 * (high - low) or high - low < 0.06
    from_zero = plots.limits(points, plots.SIMILARITY)
    assert from_zero[0] <= 0 <= from_zero[1] and (not zero or from_zero == (low, high))


def test_an_axis_of_nothing_is_an_axis() -> None:
    assert plots.limits(_points(math.nan, math.nan), plots.SIMILARITY, from_zero=False) == pytest.approx((-0.008, 0.208))


# ---------------------------------------------------------------- the words


def _numbers(difference: tuple[float, float], **changes: Entry) -> dict[str, tuple[str, dict[str, Entry], dict[str, Entry]]]:
    scores = {name: Entry.of(entry(0.5, 0.1)) for name in SCORES} | changes
    contrasts = {name: Entry.of(entry(*difference, None)) for name in (LIKENESS, BALANCE)}
    return {"layer3": ("layer4", scores, contrasts)}


def _without_teacher(numbers: Any) -> Any:
    return {
        layer: (layer, *({name: one for name, one in held.items() if "T" not in name} for held in (scores, contrasts)))
        for layer, (_, scores, contrasts) in numbers.items()
    }


ACCURACY = {role: Entry.of(entry(0.9, 0.02, None, n=450)) for role in READING_ORDER}


def _said(numbers: Any, topic: str = "Likeness") -> wording.Statement:
    (layer,) = wording.read(numbers, ACCURACY, (12, 5), 0.95).layers
    return next(statement for statement in layer.statements if statement.topic == topic)


def test_a_difference_is_stated_only_where_its_interval_excludes_zero() -> None:
    closer = _said(_numbers((0.08, 0.03), **{"FSS(S,T)": Entry.of(entry(0.91, 0.02)), "FSS(B,T)": Entry.of(entry(0.83, 0.03))}))
    assert closer.settled
    assert closer.verdict == (
        "The student’s features at layer3 are closer to the teacher’s at layer4 than the base’s are. "
        "The 95% interval of the difference excludes zero."
    )
    assert "FSS(S,T) 0.91 (0.89 to 0.93) p = 0.001; FSS(B,T) 0.83 (0.80 to 0.86) p = 0.001; difference +0.08 (0.05 to 0.11)" in closer.text
    assert "further from the teacher’s" in _said(_numbers((-0.08, 0.03))).verdict
    unsettled = _said(_numbers((0.01, 0.03)))
    assert not unsettled.settled
    assert "not settled by these images" in unsettled.verdict
    assert "includes zero" in unsettled.verdict
    assert "are closer to the teacher’s at layer4 than" not in unsettled.verdict


def test_a_score_needs_both_interval_and_permutation_test() -> None:
    for value, half, p, settled, said in (
        (0.3, 0.1, 0.001, True, "features say something about the labels that the base’s do not. The 95% interval excludes zero"),
        (0.3, 0.4, 0.001, False, "not settled by these images. The 95% interval includes zero"),
        (0.3, 0.1, 0.2, False, "excludes zero, but the permutation test does not speak against chance"),
        (-0.3, 0.1, 0.001, True, "runs against the labels"),
        (0.3, 0.1, None, True, "say something about the labels"),
    ):
        one = _said(_numbers((0.1, 0.01), **{"RS(S|B)": Entry.of(entry(value, half, p))}), "Distilled")
        assert one.settled is settled
        assert said in one.verdict


def test_likeness_itself_may_be_unsettled() -> None:
    one = _said(_numbers((0.08, 0.03), **{"FSS(B,T)": Entry.of(entry(0.02, 0.1, 0.4))}))
    assert "That the base’s features are like the teacher’s at all is not settled either." in one.verdict


def test_what_cannot_be_computed_is_said() -> None:
    missing = Entry.of({"value": None, "interval": [None, None], "p_value": None})
    numbers = _numbers((0.1, 0.01), **{"FSS(S,T)": missing, "RS(T|S)": missing})
    assert "could not be computed" in _said(numbers).verdict
    assert "could not be computed" in _said(numbers, "Missed").verdict
    assert "nan" not in _said(numbers).text


def test_accuracy_is_compared_image_by_image() -> None:
    def said(gained: int, lost: int) -> wording.Statement:
        return wording.read(_numbers((0.1, 0.01)), ACCURACY, (gained, lost), 0.95).accuracy[0]

    assert uncertainty.sign_test(12, 5) == pytest.approx(0.143463, abs=1e-6)  # scipy.stats.binomtest(5, 17).pvalue
    assert "not settled by these images" in said(12, 5).verdict
    assert "the student is more accurate than the base" in said(20, 3).verdict
    assert "the base is more accurate than the student" in said(3, 20).verdict
    assert "not settled" in said(0, 0).verdict


def test_headline_counts_layers() -> None:
    def headline(*differences: tuple[float, float]) -> str:
        layers = {f"layer{i}": _numbers(d)["layer3"] for i, d in enumerate(differences)}
        return wording.read(layers, ACCURACY, (1, 0), 0.95).headline

    up, down, open_ = (0.1, 0.05), (-0.1, 0.05), (0.0, 0.05)
    assert headline(up) == "At layer0 the student’s features are closer to the teacher’s than the base’s are."
    assert headline(up, up, up).startswith("At all 3 layers the student’s")
    assert headline(up, up, up, open_).startswith("At 3 of 4 layers the student’s")
    assert "; at layer3 it is not settled by these images" in headline(up, up, up, open_)
    assert "; at layer1 the student’s features are further" in headline(up, down)
    assert "do not settle" in headline(open_, open_, open_)


def test_without_a_teacher_student_and_base_are_compared() -> None:
    accuracy = {role: ACCURACY[role] for role in ("base", "student")}

    def read(*differences: tuple[float, float]) -> wording.Reading:
        layers = {f"layer{i}": _numbers(d)["layer3"] for i, d in enumerate(differences)}
        return wording.read(_without_teacher(layers), accuracy, (1, 0), 0.95)

    up, down, open_ = (0.1, 0.05), (-0.1, 0.05), (0.0, 0.05)
    more = "the student says more about the labels beyond the base than the base does beyond the student"
    assert read(up).headline == f"At layer0 {more}."
    assert read(up, open_).headline == f"At layer0 {more}; at layer1 it is not settled by these images which of the two says more."
    assert read(down).headline.startswith("At layer0 the base says more")
    assert "do not settle whether the student or the base says more" in read(open_).headline
    (layer,) = read(up).layers
    assert [one.topic for one in layer.statements] == ["Distilled", "Residual", "Balance"]
    every = repr(read(up, open_, down))
    assert "teacher" not in every and "4 scores each" in every


def test_the_tables_that_words_and_pictures_name_are_the_ones_computed() -> None:
    assert [" - ".join(pair) for pair in CONTRASTS] == [LIKENESS, BALANCE]
    assert [kind.name for kind in MAPS.values()] == list(MAPS)
    for kind in MAPS.values():
        assert kind.score == f"RS({kind.symbol.replace(' ', '')})" and kind.score in SCORES
        assert kind.symbol == " | ".join(role[0].upper() for role in (kind.explained, kind.given))
    told = [name for _, _, names in TABLES for name in names]
    assert sorted(told) == sorted([*SCORES, LIKENESS, BALANCE])


def test_cautions() -> None:
    def cautions(batches: int) -> str:
        scores = {name: Entry.of(entry(0.5, 0.1, batches=batches)) for name in SCORES}
        return " ".join(wording.read(_numbers((0.1, 0.01), **scores), ACCURACY, (1, 0), 0.95).cautions)

    assert "rest on 7 batches" in cautions(7)
    assert "batches" not in cautions(200)
    assert "does not show, by itself, that the teacher caused it" in cautions(200)


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (0.91, (0.89, 0.93), ("0.91", "0.89 to 0.93")),
        (-0.0001, (-0.05, 0.06), ("0.00", "−0.05 to 0.06")),
        (0.02, (0.003, 0.05), ("0.020", "0.003 to 0.050")),
        (0.9981, (0.9975, 0.9987), ("0.9981", "0.9975 to 0.9987")),
        (math.nan, (math.nan, math.nan), ("–", "– to –")),
    ],
)
def test_numbers_never_round_a_bound_to_zero(value: float, interval: tuple[float, float], expected: tuple[str, str]) -> None:
    assert wording.span(Entry(value, interval)) == expected


# ---------------------------------------------------------------- the terminal, and what goes wrong


def test_table_holds_every_score(run: Path) -> None:
    console = Console(width=120, record=True, quiet=False, file=(run / "table.txt").open("w"))
    console.print(scores_table(run))
    text = console.export_text()
    console.file.close()
    for name in SCORES:
        assert name in text
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "0.780 (0.750 to 0.810)" in text
    assert text.startswith("Scores with 95% intervals")
    assert "FSS(S,T) − FSS(B,T)" in text and "+0.100 (0.070 to 0.130)" in text


def _without(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return remove


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "no run folder"),
        (_without("manifest.json"), "no manifest.json"),
        (_without("scores.json"), "no scores.json"),
        (_without("samples.parquet"), "no samples.parquet"),
        (_without("maps.zarr"), "no maps.zarr"),
        (_without("maps.zarr/layer3"), "layer3/distilled"),
        (lambda f: (f / "manifest.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is not a JSON object"),
        (lambda f: (f / "samples.parquet").write_bytes(b"PAR1"), "samples.parquet"),
        (lambda f: (f / "overlays" / "00002.png").write_bytes(b"no"), "00002.png"),
        (lambda f: edit(f / "manifest.json", status="running", images__explained=3), "not finished: 3 of 8 images"),
        (lambda f: edit(f / "manifest.json", format=2), "format 2"),
        (lambda f: edit(f / "manifest.json", format="one"), "not the manifest of a run"),
        (lambda f: edit(f / "scores.json", layers={}), "layer1"),
    ],
)
def test_a_run_that_cannot_be_read_says_so_and_how_to_mend_it(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=4)
    spoil(folder)
    for function in (write_page,) if "distilled" in said or ".png" in said else (write_page, scores_table):
        with pytest.raises(KdxError) as caught:
            function(folder)
        assert said in caught.value.problem
        assert caught.value.hint.endswith((".", "kdx"))
    assert not (folder / "report.html").exists()
