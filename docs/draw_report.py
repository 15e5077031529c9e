"""Photographs the start of a page for the README; it needs Chromium.

python -m docs.draw_report report demo/kd/run    the page of a run, after ``make demo``, as docs/report.png
python -m docs.draw_report study STUDY           the page of a study, after ``kdx study --data digits --out STUDY``, as docs/study.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from kdx.runs.schema import PAGE

_WITHOUT_BAR = """for (const element of document.body.children)
    if (["sticky", "fixed"].includes(getComputedStyle(element).position)) element.style.display = "none";"""


def main(name: str, folder: Path) -> None:
    """Photograph the page in ``folder`` as docs/NAME.png."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1190}, color_scheme="light")
        page.goto((folder / PAGE).resolve().as_uri())
        page.evaluate(_WITHOUT_BAR)
        page.screenshot(path=Path(__file__).with_name(f"{name}.png"))
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
