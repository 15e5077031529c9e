"""The pages: their code runs, their commands exist, and what they take from the source is current."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdx
import kdx.callbacks
import kdx.cam
import kdx.distill
import kdx.models
from docs import draw_architecture, error_messages

DOCS = Path(draw_architecture.__file__).parent
ROOT = DOCS.parent
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, with no mark behind it."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page run one after another, as a reader would run them."""
    code = "\n".join(blocks(page, "python"))
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_code_that_no_test_runs_still_parses() -> None:
    for page in PAGES:
        for block in blocks(page, "python no-run"):
            ast.parse(block)


def test_code_blocks_state_a_known_language() -> None:
    for page in PAGES:
        opening = re.findall(r"^```(.*)$", page.read_text("utf-8"), re.M)[::2]
        assert set(opening) <= {"python", "python no-run", "js", "sh", "toml", "text", "json"}, page.name


def test_commands_exist() -> None:
    """Each `kdx` line and each `make` line of a page names a command with options that it has."""
    from typer.main import get_command

    from kdx.cli.commands import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    seen = 0
    for page in PAGES:
        text = page.read_text("utf-8")
        for line in re.findall(r"^(kdx .+)$", "".join(blocks(page, "sh")), re.M) + re.findall(r"^ {4}(kdx .+)$", text, re.M):
            words = re.sub(r"\s#.*", "", line).split()
            assert words[1] in commands, f"{page.name}: {line}"
            known = {option for parameter in commands[words[1]].params for option in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= known | {"--help"}, f"{page.name}: {line}"
            seen += 1
        for target in re.findall(r"`make (\w+)|^(?: {4})?make (\w+)", text, re.M):
            assert set(target) & targets, f"{page.name}: make {''.join(target)}"
    assert seen >= 5


def test_the_pictures_of_the_architecture_are_current() -> None:
    assert draw_architecture.IMPORTS.read_text("utf-8") == draw_architecture.imports_svg(), "run python -m docs.draw_architecture"
    assert draw_architecture.FLOW.read_text("utf-8") == draw_architecture.flow_svg(), "run python -m docs.draw_architecture"


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set[str]()}
    assert draw_architecture.reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert draw_architecture.levels(graph) == {"a": 0, "b": 1, "c": 2, "d": 3}


def test_the_architecture_page_has_every_folder() -> None:
    page = (DOCS / "architecture.md").read_text("utf-8")
    for name in draw_architecture.imports():
        if name not in ("cli", draw_architecture.BASE):
            assert page.count(f"| `{name}/` |") + page.count(f"| `{name}.py` |") == 1, name


def test_the_list_of_error_messages_is_current() -> None:
    page = error_messages.PAGE.read_text("utf-8")
    assert error_messages.filled(page) == page, "run python -m docs.error_messages"


def test_every_error_of_the_source_is_in_the_list() -> None:
    """Independently of the script: the longest fixed part of each problem is on the page."""
    page = error_messages.PAGE.read_text("utf-8").replace("\\", "")
    calls = [
        node
        for folder in ("kdx", "export", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "KdxError" and node.args
    ]
    assert len(calls) > 100
    for call in calls:
        parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]]
        fixed = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        assert max(fixed, key=len, default="").replace("<", "&lt;") in page, ast.unparse(call)


def test_the_api_page_has_every_public_name_once() -> None:
    listed = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text("utf-8"), re.M)
    public = {f"kdx.{name}" for name in kdx.__all__}
    public |= {f"kdx.models.{name}" for name in kdx.models.__all__} | {f"kdx.distill.{name}" for name in kdx.distill.__all__}
    public |= {f"kdx.cam.{name}" for name in kdx.cam.__all__} | {f"kdx.callbacks.{name}" for name in kdx.callbacks.__all__}
    public |= {"kdx.losses.distance_correlation", "kdx.losses.relevance", "kdx.data.as_pixels"}
    public |= {"kdx.features.prototypes", "kdx.features.soft_labels"}
    assert sorted(listed) == sorted(public)


def test_every_page_and_picture_is_used() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = {page.name for page in PAGES}
    assert pages <= set(re.findall(r"[\w-]+\.md", navigation))
    text = "".join(page.read_text("utf-8") for page in (*PAGES, ROOT / "README.md"))
    for picture in (*DOCS.glob("*.png"), *DOCS.glob("*.svg")):
        assert picture.name in text, picture.name


def test_links_and_anchors_lead_somewhere() -> None:
    """Without mkdocs too. `make docs` checks the same links in the built pages."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)):
            if target.startswith(("http:", "https:")):
                continue
            path, _, anchor = target.partition("#")
            file = (DOCS / path).resolve() if path else page
            if file.parent.name == "notebooks":  # a page that is made of the notebook
                file = file.with_suffix(".ipynb")
            assert file.is_file(), f"{page.name}: {target}"
            if anchor and not anchor.startswith("kdx."):
                headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.M)
                assert anchor in {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}, target
