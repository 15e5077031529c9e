"""The notebooks run from their first cell to their last, and what is stored of them is small."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import notebooks


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks.PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = notebooks.read(path)
    executed = notebooks.execute(stored)
    assert list(tmp_path.iterdir()) == []
    cells = [(new, old) for new, old in zip(executed["cells"], stored["cells"], strict=True) if new["cell_type"] == "code"]
    assert len(cells) >= 5
    for new, old in cells:  # the numbers may differ in the last digit from machine to machine; the kinds of output may not
        assert _kinds(new) == _kinds(old), "run python -m docs.notebooks"
    assert sum(kinds.count("image/png") for kinds in map(_kinds, executed["cells"])) >= 1


def test_the_notebooks_are_two_and_small() -> None:
    assert [path.stem for path in notebooks.PATHS] == ["compare_two_networks", "explain_a_student"]
    for path in notebooks.PATHS:
        assert path.stat().st_size < 100_000


def test_a_page_shows_code_and_outputs_in_order(tmp_path: Path) -> None:
    path = tmp_path / "small.ipynb"
    code: dict[str, object] = {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": ["print(1)\n", "2 + 3"],
    }
    words = {"cell_type": "markdown", "metadata": {}, "source": ["# Title"]}
    path.write_text(notebooks.as_text(notebooks.execute({"cells": [words, code]})))
    expected = ["# Title", "```python\nprint(1)\n2 + 3\n```", "```text\n1\n```", "```text\n5\n```"]
    assert notebooks.as_markdown(path) == "\n\n".join(expected) + "\n"


def _kinds(cell: dict[str, object]) -> list[str]:
    outputs = cell.get("outputs", [])
    assert isinstance(outputs, list)
    return [kind for output in outputs for kind in output.get("data", {output.get("name"): ""})]
