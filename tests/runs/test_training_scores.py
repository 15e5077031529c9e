"""The scores of a training: from the log beside a models file to the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdx.models import ModelsFile
from kdx.runs import schema
from kdx.runs.record import LostResult
from kdx.runs.training_scores import TrainingScores, logged_scores, read_training_scores, write_training_scores

LOG = """epoch,loss,accuracy,entropy,loss/kd,"layer1/FSS(S,T)","blocks/0/RS(S|B)"
1,2.5,0.5,1.5,1.0,,
2,1.5,0.75,0.5,0.5,0.25,0.125
3,1.0,0.75,0.25,0.25,0.5,nan
4,0.5,0.7,0.125,0.125,0.75,-0.25
"""


def models(folder: Path, **training: Any) -> ModelsFile:
    return ModelsFile(folder / "models.toml", None, "kdx:resnet", training=training)


def test_a_log_is_read_by_layer_and_score(tmp_path: Path) -> None:
    (tmp_path / "student.csv").write_text(LOG)
    lines = list[str]()
    scores = logged_scores(models(tmp_path, probe="student.csv", probe_images=64), lines.append)
    layers = {"layer1": {"FSS(S,T)": [None, 0.25, 0.5, 0.75]}, "blocks/0": {"RS(S|B)": [None, 0.125, None, -0.25]}}
    assert scores == TrainingScores(64, [1, 2, 3, 4], 3, layers)
    write_training_scores(tmp_path, scores)
    assert read_training_scores(tmp_path) == scores
    kept = {select: logged_scores(models(tmp_path, probe="student.csv", select=select), lines.append) for select in ("loss", "last")}
    assert {select: each and each.kept for select, each in kept.items()} == {"loss": 4, "last": 4} and lines == []


def test_of_equal_epochs_the_later_one_was_kept(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("epoch,accuracy,entropy,a/RS(S)\n1,0.5,1,0.1\n2,0.5,1,0.2\n3,0.5,2,0.3\n")
    scores = logged_scores(models(tmp_path, probe="log.csv"), print)
    assert scores is not None and (scores.kept, scores.images) == (2, None)


def test_without_scores_nothing_is_stored(tmp_path: Path) -> None:
    lines = list[str]()
    assert logged_scores(models(tmp_path), lines.append) is None
    (tmp_path / "student.csv").write_text("epoch,loss,loss/kd\n1,2.5,0.5\n")
    assert logged_scores(models(tmp_path, probe="student.csv"), lines.append) is None and lines == []
    (tmp_path / "broken.csv").write_text("epoch,a/RS(S)\n1,many\n")
    for name in ("absent.csv", "broken.csv"):
        assert logged_scores(models(tmp_path, probe=name), lines.append) is None
        assert f"{name} cannot be read" in lines.pop()
    assert read_training_scores(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"images": 1, "epochs": [1], "kept": 1}),
        json.dumps({"images": 1, "epochs": [], "kept": None, "layers": {}}),
        json.dumps({"images": 1, "epochs": [1, 2], "kept": 1, "layers": {"a": {"RS(S)": [0.1]}}}),
        json.dumps({"images": 1, "epochs": [1], "kept": 1, "layers": {"a": {"RS(S)": ["x"]}}}),
    ],
)
def test_a_damaged_file_is_a_lost_result(content: str, tmp_path: Path) -> None:
    (tmp_path / schema.TRAINING_FILE).write_text(content)
    with pytest.raises(LostResult, match=r"training.json cannot be read"):
        read_training_scores(tmp_path)
