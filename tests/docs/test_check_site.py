"""The check of a built site."""

from __future__ import annotations

from pathlib import Path

from docs import check_site


def test_a_broken_site_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#there">b</a><a href="#top">top</a>')
    (tmp_path / "b.html").write_text('<p id="there">B</p>')
    assert check_site.problems(tmp_path) == []
    (tmp_path / "b.html").write_text('<a href="a.html#gone">a</a><img src="no.png"><script src="https://example.org/x.js"></script>')
    lines = "\n".join(check_site.problems(tmp_path))
    assert len(lines.splitlines()) == 4
    for part in ("b.html#there, and b.html has no such anchor", "a.html#gone", "no.png, and there is no such file", "from the network"):
        assert part in lines
