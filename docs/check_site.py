"""Checks a built site: ``python -m docs.check_site site``. Every link leads somewhere, and nothing is loaded from the network."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

_LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "object": "data"}
_LOADING_LINKS = {"stylesheet", "preload", "modulepreload", "icon", "preconnect", "dns-prefetch"}


@dataclass
class _Page(HTMLParser):
    """What one page links to, what it loads, and the anchors that it has."""

    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and _LOADING_LINKS & set(values.get("rel", "").split()):
            self.loaded.append(values["href"])
        if tag in _LOADED and _LOADED[tag] in values:
            self.loaded.append(values[_LOADED[tag]])


def problems(site: Path) -> list[str]:
    """One line per link that leads nowhere and per resource that is missing or comes from the network."""
    pages = {path: _parsed(path) for path in sorted(site.rglob("*.html"))}
    lines = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in page.loaded:
            if urlsplit(link).scheme in ("http", "https") or link.startswith("//"):
                lines.append(f"{name} loads {link} from the network")
        for link in {*page.links, *page.loaded}:
            if urlsplit(link).scheme or link.startswith("//") or path.name == "404.html":
                continue
            address, anchor = urldefrag(link)
            target = (path.parent / unquote(urlsplit(address).path)).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                lines.append(f"{name} links to {link}, and there is no such file")
            elif anchor and target.suffix == ".html" and unquote(anchor) not in pages[target].anchors:
                lines.append(f"{name} links to {link}, and {target.name} has no such anchor")
    return lines


def _parsed(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text("utf-8"))
    return page


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]).resolve())
    print(*lines, sep="\n", end="\n" if lines else "")
    sys.exit(1 if lines else 0)
