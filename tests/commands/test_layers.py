"""`kdx layers`: the printed table against the features that the layers return."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import Run, in_folder

NET = """
import torch
from torch import nn

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.block(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))).mean(1))

def tokens():
    torch.manual_seed(0)
    return Tokens()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "token_nets.py").write_text(NET)
    monkeypatch.setenv("COLUMNS", "200")
    return in_folder(tmp_path, monkeypatch, capsys)


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each line by its first cell."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells}


def test_stages_have_their_channels_and_grids(run: Run) -> None:
    status, out, err = run("layers", "kdx:resnet,width=4,depth=1,classes=3", "--image-size", "24")
    table = rows(out + err)
    assert status == 0
    assert [table[f"layer{stage}"][:2] for stage in (1, 2, 3)] == [["4", "24 x 24"], ["8", "12 x 12"], ["16", "6 x 6"]]
    assert all(table[f"layer{stage}"][-1] == "yes" for stage in (1, 2, 3))


def test_named_layers_are_described_with_probed_and_stated_layouts(run: Run) -> None:
    stated = "block:tokens(prefix=1,grid=2x8)"
    status, out, err = run("layers", "token_nets:tokens", "--image-size", "16", "--layer", "block", "--layer", stated, "--layer", "head")
    table = rows(out + err)
    assert status == 0
    assert table["block"][:4] == ["6", "4 x 4", "tokens(prefix=1,grid=4x4)", "probe"]
    assert table[stated][:4] == ["6", "2 x 8", "tokens(prefix=1,grid=2x8)", "stated"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", "blok"), "no layer 'blok'"),
        (("--layer", "block:tokns"), "'tokns' is not a layout"),
        (("--image-size", "2"), "does not run on an image of 2 x 2"),
    ],
)
def test_mistakes_are_two_lines(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, _, err = run("layers", "token_nets:tokens", *arguments)
    assert status == 2 and message in err and len(err.splitlines()) == 2


def test_images_on_which_no_stage_has_a_map_are_refused(run: Run) -> None:
    status, _, err = run("layers", "kdx:resnet,width=4,depth=1,classes=3", "--image-size", "1")
    assert status == 2 and "no stage or block with a map on images of 1 x 1" in err
