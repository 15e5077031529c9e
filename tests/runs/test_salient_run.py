"""Runs whose scores are of salient features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdx
from kdx.commands import explain
from kdx.data.batches import random_batches
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.maps.salient_images import Salience
from kdx.models import models_file
from kdx.roles import ROLES, SCORE_MAPS
from kdx.runs.run import RunOptions
from tests.runs.small_run import CLASSES, OPTIONS, SALIENT, SIZE, results, run


def test_scores_are_of_salient_features_and_the_rest_of_whole_images(finished: Path, salient: Path) -> None:
    raw, actual = results(finished), results(salient)
    missing = {key.partition("/")[2] for key in raw.keys() - actual.keys() if not key.startswith("overlays")}
    assert missing == set(SCORE_MAPS)  # no map adds up to a score of other features
    for key in ("layer2/distilled", "layer3/residual", "layer3/missed", "layer2/new"):
        assert np.allclose(actual[key], raw[key], rtol=1e-4, atol=1e-6)
    assert actual["images"] == raw["images"]
    for name, values in actual["samples"].items():
        if "/" not in name:
            assert values == raw["samples"][name]
    scores, others = (json.loads((out / "scores.json").read_text()) for out in (salient, finished))
    assert scores["features"] == {"kind": "salient", "keep": 0.4, "noise": 0.05} and others["features"] == {"kind": "raw"}
    assert scores["accuracy"] == others["accuracy"]
    for layer in ("layer2", "layer3"):
        for name, score in scores["layers"][layer]["scores"].items():
            assert score["value"] != others["layers"][layer]["scores"][name]["value"]


def test_a_runs_scores_are_the_explainers(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", replace(SALIENT, batch=64, noise=0.0))
    dataset = open_data(str(folder / "pictures"), CLASSES)
    (batch,) = random_batches(dataset.labels, 64, 3)
    trio = models_file.read_models(folder / "models.toml")
    networks: dict[str, Any] = {role: trio.load(role) for role in ROLES}
    with kdx.Explainer(**networks, layers=["layer2", "layer3"], runtime="eager", permutations=0, features="salient", keep=0.4) as explainer:
        expected = explainer(load_images(dataset, batch, SIZE).pixels, torch.from_numpy(dataset.labels[batch]))
    stored = json.loads((tmp_path / "run" / "scores.json").read_text())["layers"]
    for layer, result in expected.layers.items():
        assert {name: score["value"] for name, score in stored[layer]["scores"].items()} == pytest.approx(
            {name: score.value for name, score in result.scores.items()}, abs=1e-9
        )


@pytest.mark.slow
def test_every_batch_has_its_own_noise(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def recorded(self: Salience, pixels: torch.Tensor, maps: torch.Tensor, seed: int = 0, *_: object) -> torch.Tensor:
        seeds.append(seed)
        return pixels

    monkeypatch.setattr(Salience, "images", recorded)
    run(folder, tmp_path / "run", SALIENT)
    assert len(set(seeds)) == len(seeds) == 4 * 2 * 3  # batches, layers and networks


@pytest.mark.parametrize("other", [OPTIONS, replace(SALIENT, keep=0.5), replace(SALIENT, noise=0.0)])
def test_other_features_are_another_run(folder: Path, salient: Path, other: RunOptions) -> None:
    with pytest.raises(kdx.KdxError, match=r"another run \(it differs in features\)"):
        run(folder, salient, other)


def test_a_configuration_of_raw_features_does_not_mention_features(finished: Path, salient: Path) -> None:
    raw, scored = (json.loads((out / "manifest.json").read_text())["configuration"] for out in (finished, salient))
    assert scored.pop("features") == {"kind": "salient", "keep": 0.4, "noise": 0.05}
    assert raw == scored and not {"features", "keep", "noise"} & raw.keys()


def test_the_page_states_which_features_the_scores_compare(finished: Path, salient: Path) -> None:
    message = "the top 40% of pixels by HiResCAM are kept and the rest are imputed with noise of standard deviation 0.05"
    page = (salient / "report.html").read_text()
    assert f"The scores describe salient features: {message}." in page and "The maps describe whole images" in page
    assert "salient" not in (finished / "report.html").read_text()


def test_exported_files_have_no_salient_features(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('base = "base.onnx"\nstudent = "student.onnx"\nlayers = ["layer2"]\n')
    with pytest.raises(kdx.KdxError, match="contain no gradients"):
        explain.run(str(folder / "pictures"), tmp_path / "models.toml", tmp_path / "run", (), SALIENT)
    assert not (tmp_path / "run").exists()
