"""Photographs the start of the page of a run as docs/report.png: ``python -m docs.draw_report demo/kd/run``, after ``make demo``.

It needs Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from kdx.runs.schema import PAGE

PICTURE = Path(__file__).with_name("report.png")

_WITHOUT_BAR = """for (const element of document.body.children)
    if (["sticky", "fixed"].includes(getComputedStyle(element).position)) element.style.display = "none";"""


def main(run: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1190}, color_scheme="light")
        page.goto((run / PAGE).resolve().as_uri())
        page.evaluate(_WITHOUT_BAR)
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
