"""Pages of the site that are not files of docs/: the notebooks, CONTRIBUTING.md and CHANGELOG.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from docs import notebooks

ROOT = Path(__file__).parents[1]

ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Any, config: Any) -> Any:
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=from_root((ROOT / name).read_text("utf-8"))))
    for path in notebooks.PATHS:
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebooks.as_markdown(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to a page of the repository's root lead to its page of the site, and the mark of a block that no test runs goes."""
    markdown = markdown.replace("```python no-run", "```python")
    for name, page in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown


def from_root(markdown: str) -> str:
    """A page of the repository's root as a page of docs/. A link to a file that the site does not have becomes its text."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        page = ROOT_PAGES.get(target) or target.removeprefix("docs/")
        known = page in ROOT_PAGES.values() or (target.startswith("docs/") and (ROOT / target).is_file())
        return f"[{text}]({page}{anchor})" if known else text

    return re.sub(r"\[([^\]]+)\]\((?!https?:)([^)#]+)(#[^)]*)?\)", link, markdown)
