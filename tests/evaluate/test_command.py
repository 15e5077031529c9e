"""`kdx evaluate` on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command_line import Run, in_folder


@pytest.fixture
def kdx_in_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line beside the run without networks, and masks of 5 of its 12 images."""
    assert made.parent == tmp_path
    (tmp_path / "masks").mkdir()
    for number in range(5):
        mask = np.zeros((32, 32), np.uint8)
        mask[4:20, number : number + 9] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"image-{number:05d}.png")
    return in_folder(tmp_path, monkeypatch, capsys)


def test_the_table_and_the_page(kdx_in_folder: Run, tmp_path: Path) -> None:
    arguments = ("--masks", "masks", "--map", "RS(S) - RS(B)", "--map", "centre", "--metric", "energy", "--metric", "density")
    status, out, err = kdx_in_folder("evaluate", "run", *arguments)
    assert (status, err) == (0, "")
    assert "7 of 12 images without a mask are left out, such as image-00005" in out
    assert "Maps of layer3: means over images, with 95% intervals" in out and "energy ↑" in out
    rows = [line for line in out.splitlines() if line.strip().startswith(("RS(S) − RS(B) ", "centre "))]
    assert len(rows) == 2 and "RS(S) − RS(B)" in rows[0] and all(row.count("\N{NO-BREAK SPACE}to") == 2 for row in rows)
    assert "energy inside the mask" in (tmp_path / "run" / "report.html").read_text().lower()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("run --masks nowhere", "There are no masks at nowhere."),
        ("run --masks masks --metric energies", "There is no metric 'energies'."),
        ("run --masks masks --map centr", "The run has no map 'centr' to evaluate."),
        ("run --masks masks --layer fc", "The run has no layer 'fc'."),
        ("run --metric energy", "There are no masks."),
        ("run --masks masks --map grad_cam_student", "The run's data cannot be opened"),
        ("nowhere --masks masks", "There is no run folder at nowhere."),
        ("run --images 1 --masks masks", "An interval over images needs at least 2 images."),
    ],
)
def test_mistakes_have_status_2_and_change_nothing(kdx_in_folder: Run, arguments: str, problem: str, tmp_path: Path) -> None:
    if "data" in problem:
        manifest = tmp_path / "run" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"digits"', '"folder:gone"'))
    status, _, err = kdx_in_folder("evaluate", *arguments.split())
    assert status == 2 and err.startswith(f"Error: {problem}") and len(err.splitlines()) == 2
    assert not (tmp_path / "run" / "evaluation.json").exists() and not (tmp_path / "run" / "report.html").exists()
