"""A browser that opens pages: fixtures of tests/conftest.py, so that every process has one browser for all folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(names)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages. At the end it checks that a page caused no message, no alert, no error and no request except for itself."""
    pages: list[tuple[Page, str, list[str]]] = []

    def open_(run: Path, width: int = 1280, scheme: Any = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        address, events = (run / "report.html").as_uri(), list[str]()
        page.on("console", lambda message: events.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: events.append(f"error: {error}"))
        page.on("request", lambda request: events.append(f"request: {request.url}") if _is_external(request.url, address) else None)
        # The console records an alert; Playwright would dismiss a dialog without a trace.
        page.add_init_script("window.alert = (text) => console.log(`alert ${text}`);")
        page.goto(address)
        pages.append((page, address, events))
        return page

    yield open_
    for page, address, events in pages:
        assert events == []
        assert page.url.split("#")[0] == address
        page.close()


def _is_external(url: str, address: str) -> bool:
    return url != address and not url.startswith(("data:", "blob:"))


def saved(page: Page, button: Locator) -> bytes:
    """The content of the file that a button saves."""
    with page.expect_download() as download:
        button.click()
    return Path(download.value.path()).read_bytes()


def beyond_the_window(page: Page, hidden: str = ".unseen") -> list[str]:
    """The elements that reach beyond the right edge, except those that scroll inside another one, drawings, and ``hidden`` (a selector)."""
    elements: list[str] = page.evaluate(
        "hidden => [...document.querySelectorAll('main *, header *, footer *')].filter(e => e.getClientRects().length && "
        "!e.closest(hidden + ', svg, .scroll *') && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 120))",
        hidden,
    )
    return elements


def out_of_reach(page: Page) -> int:
    """The number of elements that scroll and that the keyboard cannot reach."""
    count: int = page.evaluate(
        "() => [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length"
    )
    return count
