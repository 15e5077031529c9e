"""The page about security names a test for every threat, and the policy of the pages that it describes."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text("utf-8")


def test_every_threat_names_a_test_that_exists() -> None:
    table = PAGE.partition("| --- |")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines()[1:] if line.startswith("|")]
    assert len(rows) > 15
    for row in rows:
        named = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)` \|$", row)
        assert named is not None, row
        assert f"def {named[2]}(" in (ROOT / named[1]).read_text("utf-8"), row


def test_every_page_has_the_policy() -> None:
    """All pages extend the one template that states it, and no template has another script that runs or an event handler."""
    templates = [*ROOT.glob("kdx/**/templates/*.j2")]
    pages = [path for path in templates if "<!doctype" in path.read_text("utf-8").lower()]
    assert [path.name for path in pages] == ["base.html.j2"]
    assert "default-src 'none'; img-src data:;" in pages[0].read_text("utf-8")
    for path in templates:
        text = path.read_text("utf-8")
        assert not re.search(r"\son\w+=", text), path
        assert set(re.findall(r"<script[^>]*>", text)) <= {
            "<script>" if path in pages else "",
            '<script type="application/json" id="payload">',
        }
