"""Runs with the preset ``published``, and with the mean of the batches' scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdx
from kdx.choices import Resizing
from kdx.data.batches import random_batches
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.models import models_file
from kdx.roles import ROLES
from kdx.runs.plan import RunOptions
from kdx.runs.presets import PRESETS
from tests.command_line import status_of
from tests.runs.small_run import CLASSES, OPTIONS, SIZE, run

PUBLISHED = RunOptions(**{**PRESETS["published"], "batch": 9, "noise": 0.0}, permutations=19, runtime="eager", seed=3, gallery=4)


def stored(out: Path) -> dict[str, dict[str, float]]:
    layers = json.loads((out / "scores.json").read_text())["layers"]
    return {layer: {name: entry["value"] for name, entry in (of["scores"] | of["contrasts"]).items()} for layer, of in layers.items()}


def batch_values(folder: Path, options: RunOptions) -> list[dict[str, dict[str, float]]]:
    """The scores and contrasts of every batch, from an Explainer that sees only this batch."""
    resizing = Resizing(options.resize or "cover", options.interpolation or "bicubic")
    dataset = replace(open_data(str(folder / "pictures"), CLASSES), resizing=resizing)
    trio = models_file.read_models(folder / "models.toml")
    networks: dict[str, Any] = {role: trio.load(role) for role in ROLES}
    names = ("features", "keep", "noise", "salient_class", "salient_score", "salient_image")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    values = []
    with kdx.Explainer(**networks, layers=["layer2", "layer3"], runtime="eager", permutations=0, **settings) as explainer:
        for batch in random_batches(dataset.labels, options.batch, options.seed):
            result = explainer(load_images(dataset, batch, SIZE).pixels, torch.from_numpy(dataset.labels[batch]))
            scores = {layer: {name: score.value for name, score in of.scores.items()} for layer, of in result.layers.items()}
            contrasts = {layer: {name: contrast.value for name, contrast in of.contrasts.items()} for layer, of in result.layers.items()}
            values.append({layer: scores[layer] | contrasts[layer] for layer in scores})
    return values


@pytest.mark.parametrize(
    "options", [pytest.param(replace(OPTIONS, ratios="mean"), marks=pytest.mark.slow), PUBLISHED], ids=["raw", "published"]
)
def test_scores_are_the_means_of_the_batches(options: RunOptions, folder: Path, tmp_path: Path) -> None:
    page = run(folder, tmp_path / "run", options)
    batches = batch_values(folder, options)
    for layer, values in stored(tmp_path / "run").items():
        expected = {name: float(np.mean([batch[layer][name] for batch in batches])) for name in values}
        assert values == pytest.approx(expected, abs=1e-6)
    assert len(batches) > 2 and "mean of the batches’ scores" in page.read_text("utf-8")
    entry = json.loads((tmp_path / "run" / "scores.json").read_text())["layers"]["layer3"]["scores"]["RS(S)"]
    assert -1 <= entry["interval"][0] <= entry["value"] <= entry["interval"][1] <= 1 and 0.05 <= entry["p_value"] <= 1


@pytest.mark.slow
def test_one_batch_is_its_own_mean(folder: Path, tmp_path: Path) -> None:
    for ratios in ("summed", "mean"):
        run(folder, tmp_path / ratios, replace(OPTIONS, batch=64, ratios=ratios))
    assert (tmp_path / "summed" / "scores.json").read_bytes() == (tmp_path / "mean" / "scores.json").read_bytes()


def test_the_preset_sets_what_the_command_line_does_not(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["explain", str(folder / "pictures"), "--models", str(folder / "models.toml"), "--out", str(out)]
    assert (
        status_of(*command, "--preset", "published", "--batch", "9", "--resize", "cover", "--permutations", "0", "--runtime", "eager") == 0
    )
    configuration = json.loads((out / "manifest.json").read_text())["configuration"]
    assert (configuration["batch"], configuration["geometry"], configuration["ratios"]) == (9, "batch", "mean")
    assert configuration["resize"] == {"mode": "cover", "interpolation": "bilinear"}
    assert configuration["features"] == {
        "kind": "salient", "keep": 0.5, "noise": 0.01, "class": "true", "score": "probability", "image": "published"
    }  # fmt: skip
    assert "contrast of the authors’ code" in (out / "report.html").read_text("utf-8")


def test_the_mean_of_ratios_needs_batches() -> None:
    with pytest.raises(kdx.KdxError, match="needs the geometry batch"):
        RunOptions(ratios="mean")
