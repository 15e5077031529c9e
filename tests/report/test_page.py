"""The page in a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page
from rich.console import Console

from kdx.report import page as page_module
from kdx.report.drawing import LINES
from kdx.report.layout import script_json
from kdx.report.page import write_page
from kdx.report.terminal import scores_table
from tests.browser import beyond_the_window
from tests.made_runs import ODD_LAYER, SCRIPT, edit, make_run
from tests.report.test_gallery_page import kinds_shown, samples, shown

pytestmark = pytest.mark.slow  # most of these open a page in a browser


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


def test_a_right_prediction_has_a_mark_besides_its_colour(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    for place, sample in enumerate(samples(run)[:12]):
        lines = page.locator(".card").nth(place).locator(".predictions tr").all_text_contents()
        for role, line in zip(("teacher", "base", "student"), lines, strict=True):
            right = sample[f"{role}_prediction"] == sample["label"]
            assert line.split()[:2] == [role, "✓right" if right else "✗wrong"]


def test_page_is_labelled(run: Path, opened: Callable[..., Page]) -> None:
    page = opened(run)
    faults = page.evaluate("""() => {
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
    assert faults == {"unlabelled": 0, "noalt": 0, "nameless": 0, "twice": [], "dangling": [], "references": [], "titles": 1}


@pytest.mark.parametrize("width", [400, 320])
def test_no_horizontal_overflow(run: Path, hostile: Path, pair: Path, opened: Callable[..., Page], width: int) -> None:
    for folder in (run, hostile, pair):
        page = opened(folder, width=width)
        page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # No element may be clipped: an element wider than the window must scroll inside itself.
        assert beyond_the_window(page, ".unseen, thead") == []


def test_hostile_names_are_text(hostile: Path, opened: Callable[..., Page]) -> None:
    page = opened(hostile)  # the fixture fails on a dialog, an error or a request
    assert page.locator(".card h3").first.inner_text() == SCRIPT
    assert page.locator(".card .id").first.inner_text().startswith("</script><script>alert(0)")
    assert page.locator(".matrix thead code").first.inner_text() == ODD_LAYER
    assert page.locator("[data-layer] bdi").first.inner_text() == ODD_LAYER
    assert page.locator("#command").inner_text() == f"kdx '{SCRIPT}' 'it'\"'\"'s'"
    assert page.locator("main :is(b, i, u):has-text('bytes'), main i:has-text('layer4'), header u").count() == 0
    assert page.locator("script").count() == 2
    assert len(shown(page)) == 8
    page.get_by_role("button", name=ODD_LAYER).click()
    canvas = page.locator(".card canvas").first
    assert canvas.get_attribute("aria-label") == f"RS(S) − RS(B) map of {samples(hostile)[0]['id']} at {ODD_LAYER}"
    other = page.locator("[data-layer] bdi").nth(1).inner_text()
    page.locator("[data-layer]").nth(1).click()
    page.reload()
    assert page.locator("[data-layer][aria-pressed=true] bdi").inner_text() == other
    page.locator(".card .enlarge").first.click()
    assert page.locator("#zoom-title").inner_text().startswith(f"{SCRIPT} · </script>")


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
    """Text has a contrast of at least 4.5 to 1 on every background, in both themes (WCAG AA)."""
    style = (Path(page_module.__file__).parent / "templates" / "base.css").read_text(encoding="utf-8")
    colours = re.findall(r"--([a-z0-9-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", style)
    assert not re.search(r": #[0-9a-f]", style)  # every colour has one for each theme
    themes = [{name: pair[theme] for name, *pair in colours} for theme in (0, 1)]

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
            *((name, 3) for name in LINES),
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
    assert "stored no pictures" in page.locator("#gallery .empty").inner_text()
    page.get_by_text("1 image could not be read and is not included in any number").click()
    assert "broken.png truncated" in page.locator(".unreadable li").inner_text()


def test_the_page_of_a_run_without_a_teacher_does_not_mention_a_teacher(pair: Path, opened: Callable[..., Page]) -> None:
    page = opened(pair)
    text = page.locator("body").inner_text()
    names = "FSS", "T | S", "S | T", "RS(T", "|T)", "missed", "eacher"
    assert [name for name in names if name in text.replace("On Explaining Knowledge Distillation", "")] == []
    assert page.locator("h1").inner_text() == "How the student differs from the base"
    assert page.locator(".network h3").all_inner_texts() == ["Base", "Student"]
    assert (
        page.locator(".plot").count() == 2
        and page.locator("#scores table.scores").count() == 2
        and page.locator("table.pairs").count() == 0
    )
    kinds = ["RS(S) − RS(B)", "RS(S)", "RS(B)", "RS(S|B)", "Distilled S | B", "Residual B | S"]
    assert [" ".join(text.split()) for text in page.locator(".kinds dt").all_text_contents()] == kinds
    assert kinds_shown(page) == ["rs_student_minus_base", "rs_student", "rs_base", "distilled"]
    assert page.locator("#outcome option").count() == 5
    assert page.locator(".card").first.locator(".predictions tr th").all_inner_texts() == ["base", "student"]
    written = {path.stem.split("_", 2)[2] for path in (pair / "overlays").glob("00000_*_*.png")}
    assert written == {"distilled", "residual", "rs_student_minus_base"}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(scores_table(pair))
    table = console.export_text()
    assert "RS(S|B) − RS(B|S)" in table and "T" not in table


def test_the_page_states_random_weights(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=0)
    edit(folder / "manifest.json", random_weights=["base"])
    page = write_page(folder).read_text()
    assert page.count("Some or all of its weights are random.") == 1
    assert "trained without the teacher. Some or all of its weights are random." in page


@pytest.mark.parametrize(
    ("used", "sentence"),
    [(None, "It is not known whether"), (12, "12 of the 40 images explained"), (0, "")],
)
def test_the_page_states_images_of_the_training_before_any_result(
    tmp_path: Path, opened: Callable[..., Page], used: int | None, sentence: str
) -> None:
    folder = make_run(tmp_path / "run")
    edit(folder / "manifest.json", images__trained_on=used)
    write_page(folder)
    page = opened(folder, width=400)
    if sentence:
        notice = page.locator(".notice")
        assert sentence in notice.inner_text() and notice.is_visible()
        assert notice.bounding_box()["y"] < page.locator(".lede").bounding_box()["y"]  # type: ignore[index]
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    else:
        assert page.locator(".notice").count() == 0


def test_salient_features_are_stated_beside_all_scores(tmp_path: Path, opened: Callable[..., Page]) -> None:
    folder = make_run(tmp_path / "run")
    edit(folder / "manifest.json", configuration__features={"kind": "salient", "keep": 0.5, "noise": 0.0})
    write_page(folder)
    page = opened(folder, width=400)
    clause = "the top 50% of pixels by HiResCAM are kept and the rest are imputed"
    assert page.locator(".basis").inner_text().endswith(f"The scores describe salient features: {clause}.")
    assert clause in page.locator(".definitions").inner_text() and clause in page.locator(".cautions li").first.inner_text()
    assert page.locator(".depends").inner_text().endswith("The maps describe whole images; the scores describe salient features.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert str(scores_table(folder).title) == "Scores of salient features with 95% intervals"


def test_the_map_that_ranks_pixels_is_described_as_chosen(tmp_path: Path) -> None:
    """The scores of the authors' code rank by the true class's probability at the last layer, not as kdx does by default."""
    folder = make_run(tmp_path / "run", images=8, gallery=0)
    for settings, sentence in (
        ({}, "map at the same layer, for the logit of the class that it predicts."),
        (
            {"class": "true", "score": "probability", "image": "published"},
            "map at the last of the explained layers, for the probability of the true class.",
        ),
    ):
        edit(folder / "manifest.json", configuration__features={"kind": "salient", "keep": 0.5, "noise": 0.0, **settings})
        assert write_page(folder).read_text().count(sentence) == 1


def test_the_page_of_class_embeddings_does_not_speak_of_labels(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=0)
    plain = write_page(folder).read_text()
    edit(folder / "manifest.json", target_file="words.csv")
    page = write_page(folder).read_text()
    assert plain.count("the labels") > 5 and "the labels" not in page
    assert page.count("the class embeddings") > plain.count("the labels")
    assert "Relevance to the class embeddings" in page


def test_writing_the_page_removes_what_a_killed_process_left(run: Path) -> None:
    leftovers = [run / "overlays" / ".00003_layer3_distilled.png.123", run / ".report.html.123"]
    for path in leftovers:
        path.write_bytes(b"part")
    write_page(run)
    assert not any(path.exists() for path in leftovers)
