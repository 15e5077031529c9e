"""Runs that kdx 0.1.0 wrote still open, and a stopped one still resumes.

`run_of_0.1.0.zip` contains two networks of random weights (`kdx:resnet,width=2,depth=1`), their models file, a complete run of them on
scikit-learn's digits (three batches of 150 images, layer3, 19 permutations), and the same run stopped after its first batch.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from kdx.commands import explain
from kdx.report.page import write_page
from kdx.runs.run import RunOptions

OPTIONS = RunOptions(batch=150, runtime="eager", device="cpu", permutations=19, gallery=4)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(Path(__file__).with_name("run_of_0.1.0.zip")) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)  # the networks are named by relative paths
    return tmp_path


def test_the_page_of_an_old_run_is_written_again(old: Path) -> None:
    page = write_page(old / "complete").read_text()
    scores = json.loads((old / "complete" / "scores.json").read_text())
    assert f"{scores['layers']['layer3']['scores']['RS(S)']['value']:.3f}" in page.replace("\N{MINUS SIGN}", "-")
    assert len(list((old / "complete" / "overlays").glob("*_layer3_distilled.png"))) == 4


def test_an_old_run_that_was_stopped_resumes_with_the_same_result(old: Path) -> None:
    lines: list[str] = []
    explain.run("digits", Path("models.toml"), Path("stopped"), (), OPTIONS, announce=lines.append)
    assert any(line.startswith("Resuming: 1 of 3 batches") for line in lines)
    complete, resumed = (json.loads((old / name / "scores.json").read_text())["layers"]["layer3"] for name in ("complete", "stopped"))
    for name, score in complete["scores"].items():
        for key in ("value", "p_value", "n", "batches"):
            assert resumed["scores"][name][key] == pytest.approx(score[key], rel=1e-4, abs=1e-6)
        # The first batch has no moments, so the interval comes from the batches, as it did; it is now linear in the inner products.
        assert resumed["scores"][name]["interval"] == pytest.approx(score["interval"], abs=0.01)
    for kind in ("distilled", "residual"):
        expected, actual = (maps_of(old / name, kind) for name in ("complete", "stopped"))
        assert np.allclose(actual, expected, rtol=1e-3, atol=1e-3 * expected.max())


def maps_of(run: Path, kind: str) -> NDArray[np.float32]:
    return np.asarray(zarr.open_array(run / "maps.zarr" / "layer3" / kind, mode="r"))
