"""The examples of docs/monitoring.md, in the order of the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kdx

PAGE = Path(kdx.__file__).parents[1] / "docs" / "monitoring.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, since torchvision, which Lightning imports, may need the operators that `tests.conftest` declares."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python no-run\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M)
    names: dict[str, Any] = {"__name__": "example"}
    printed = []
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(blocks) == 3
    plain = re.findall(r"^(\d) (\{.*\})$", printed[0], re.M)
    assert [epoch for epoch, _ in plain] == ["0", "1"] and all("'layer3/FSS(S,T)': " in row for _, row in plain)
    lightning = names["callback"]._arguments[0](names["student"]).row()["layer3/FSS(S,T)"]
    assert f"tensor({float(torch.tensor(lightning)):.4f})" in printed[1]
    *_, last = printed[2].splitlines()
    scores = [float(number) for number in last.strip("[]").split(", ")]
    assert len(scores) == 2 and scores[-1] == names["probe"](names["trainer"].model).row()["vit.layers.1/FSS(S,T)"]
