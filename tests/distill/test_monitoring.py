"""Logs of a training, and the scores of probe images, against the finished networks."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kdx
from kdx.commands.explain import run as explain
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.data.splits import class_balanced_sample, stratified_splits
from kdx.distill import EpochResult, distill
from kdx.distill.monitoring import open_logs
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph
from kdx.models import models_file
from kdx.report.page import write_page
from kdx.roles import SCORES
from kdx.runs.run import RunOptions
from kdx.runs.training_scores import logged_scores
from tests.distill.small import QUICK, STUDENT, TEACHER, Interruption, stop_at

SETTINGS = replace(QUICK, select="last", ema=0.8)


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[EpochResult]]:
    """A probed run that was interrupted after the second epoch of its student."""
    out, results = tmp_path_factory.mktemp("probe") / "run", list[EpochResult]()

    def report(result: EpochResult) -> None:
        results.append(result)
        if len(results) == 7:
            stop_at("student", 2)(result)

    for _ in range(2):
        try:
            distill("digits", teacher=TEACHER, student=STUDENT, out=out, settings=SETTINGS, log=["csv"], probe=60, report=report)
        except Interruption:
            assert results[-1].network == "student"
    return out, [result for result in results if result.loss is not None]


@pytest.mark.slow
def test_the_scores_of_the_last_epoch_are_those_of_the_finished_networks(run: tuple[Path, list[EpochResult]]) -> None:
    out, _ = run
    last = rows(out / "student.csv")[-1]
    file, digits = models_file.read_models(out / "models.toml"), open_data("digits")
    validation = stratified_splits(digits, 0)["validation"]
    indices = validation[class_balanced_sample(digits.labels[validation], 60, 0)]
    pixels, labels = load_images(digits, indices, (8, 8)).pixels, digits.labels[indices]
    assert np.bincount(labels).tolist() == [6] * 10
    features = {}
    for role in ("teacher", "base", "student"):
        network = file.load(role)
        with torch.no_grad():
            features[role] = FeatureGraph(network.module, file.layers, network.preprocessing)(pixels)[1:]
    for index, layer in enumerate(file.layers):
        student, base, teacher = (features[role][index] for role in ("student", "base", "teacher"))
        expected = {
            "FSS(S,T)": kdx.fss(student, teacher, permutations=0).value,
            "FSS(B,T)": kdx.fss(base, teacher, permutations=0).value,
            "RS(S)": kdx.rs(student, labels, permutations=0).value,
            "RS(S|B)": kdx.rs(student, labels, given=base, permutations=0).value,
        }
        for name, value in expected.items():
            assert last[f"{layer}/{name}"] == pytest.approx(value, abs=1e-3), name


def test_every_epoch_has_one_row_across_interruptions(run: tuple[Path, list[EpochResult]]) -> None:
    out, results = run
    for role, epochs in (("teacher", 2), ("base", 3), ("student", 3)):
        logged = rows(out / f"{role}.csv")
        expected = [result.row() for result in results if result.network == role]
        assert [row["epoch"] for row in logged] == list(range(1, epochs + 1)) and len(expected) == epochs
        for row, figures in zip(logged, expected, strict=True):
            assert row == pytest.approx(figures)
            assert sum(value for name, value in row.items() if name.startswith("loss/")) == pytest.approx(row["loss"], rel=1e-5)
            assert ("layer2/RS(S)" in row) == (role == "student")
    scores = [row["layer2/FSS(S,T)"] for row in rows(out / "student.csv")]
    assert len(set(scores)) == 3  # the student changes, and the probe images do not


def test_the_models_file_names_the_scores_and_a_run_shows_them(run: tuple[Path, list[EpochResult]]) -> None:
    lines = list[str]()
    scores = logged_scores(models_file.read_models(run[0] / "models.toml"), lines.append)
    assert scores is not None and lines == []
    assert (scores.images, scores.epochs, scores.kept) == (60, [1, 2, 3], 3)
    logged = rows(run[0] / "student.csv")
    assert {f"{layer}/{score}": values for layer, by_score in scores.layers.items() for score, values in by_score.items()} == {
        name: [row[name] for row in logged] for name in logged[0] if name.rpartition("/")[2] in SCORES
    }


@pytest.mark.slow
def test_explain_shows_the_scores_of_the_training_without_its_folder(run: tuple[Path, list[EpochResult]], tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(run[0], models)
    page = explain("digits", models / "models.toml", tmp_path / "run", options=RunOptions(permutations=9), announce=lambda line: None)
    written = page.read_bytes()
    assert b"The scores of 60 fixed validation images" in written and written.count(b"over the epochs of the training") == 3
    shutil.rmtree(models)
    assert write_page(tmp_path / "run").read_bytes() == written


def test_tensorboard_has_the_figures_of_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    figures = [{"epoch": 1, "loss": 2.5, "layer2/FSS(S,T)": 0.25}, {"epoch": 2, "loss": 1.5, "layer2/FSS(S,T)": 0.5}]
    with open_logs(["tensorboard"], tmp_path) as log:
        assert log is not None
        for count in (1, 2):
            log("student", figures[:count])
    (path,) = (tmp_path / "tensorboard" / "student").iterdir()
    data, offset = path.read_bytes(), 0
    logged: dict[tuple[int, str], float] = {}
    while offset < len(data):  # a record: length, checksum of the length, content, checksum of the content
        (length,) = struct.unpack_from("<Q", data, offset)
        event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length])
        logged |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        offset += 16 + length
    # TensorBoard replaces characters that its tags do not allow.
    assert {key: value for key, value in logged.items() if key[1] == "loss"} == {(1, "loss"): 2.5, (2, "loss"): 1.5}
    assert sorted(value for key, value in logged.items() if key[1] != "loss") == [0.25, 0.5]


def opened(names: list[str], folder: Path) -> bool:
    with open_logs(names, folder) as log:
        return log is not None


def test_logs_that_do_not_exist_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KdxError, match=r"no log 'xml'.*\n.*csv, tensorboard, wandb"):
        opened(["csv", "xml"], tmp_path)
    if importlib.util.find_spec("accelerate") and not importlib.util.find_spec("wandb"):
        with pytest.raises(KdxError, match="log wandb needs a package"):
            opened(["wandb"], tmp_path)
    for name in {"accelerate", *(name for name in sys.modules if name.split(".")[0] == "accelerate")}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KdxError, match=r"accelerate, which is not installed.*\n.*kdx\[distill\]"):
        opened(["tensorboard"], tmp_path)
    assert opened(["csv", "csv"], tmp_path) and not opened([], tmp_path)
