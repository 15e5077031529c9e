"""Scores of salient features: step by step, in every runtime, and with noise."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx import KdxError
from kdx.explain.results import Explanation
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.maps.salient_images import Salience
from kdx.models.network import Network
from tests.explain.small_networks import (
    LAYERS,
    SIZE,
    StandInEngines,
    assert_same,
    assert_same_maps,
    close,
    explainer,
    files,
    images,
    labels,
    named_networks,
    networks,
    refuse_export,
    score_of,
)


def salient_features(keep: float) -> dict[str, dict[str, Tensor]]:
    """Per role and student's layer: the role's features of its own salient images, step by step in PyTorch."""
    actual: dict[str, dict[str, Tensor]] = {}
    for role, network in networks().items():
        actual[role] = {}
        for layer, other in LAYERS.items():
            name = other if role == "teacher" else layer
            ranked = kdx.hires_cam(network, images(), name).scaled(SIZE)
            with torch.no_grad():
                _, actual[role][layer] = FeatureGraph(network, [name])(kdx.impute(images(), kdx.top_mask(ranked, keep)))
    return actual


def test_scores_are_those_of_salient_features_and_maps_those_of_raw_ones(explained: Explanation[Any], salient: Explanation[Any]) -> None:
    assert_same_maps(salient, explained, 0.0)
    expected_features = salient_features(0.4)
    for layer, result in salient.layers.items():
        layer_features = {role: maps[layer] for role, maps in expected_features.items()}
        for name, score in result.scores.items():
            expected = score_of(name, layer_features)
            assert score.value == pytest.approx(expected.value, abs=1e-9)
            assert score.interval == pytest.approx(expected.interval, abs=1e-7)
            assert score.p_value == expected.p_value
            assert abs(score.value - explained.layers[layer].scores[name].value) > 1e-3
        for name, (value, (low, high)) in result.contrasts.items():
            more, less = name.split(" - ")
            assert value == pytest.approx(result.scores[more].value - result.scores[less].value, abs=1e-12) and low <= value <= high


@pytest.mark.parametrize("chunk", [1, 5])
def test_the_chunk_does_not_change_the_scores_of_salient_features(salient: Explanation[Any], chunk: int) -> None:
    with explainer(features="salient", keep=0.4, chunk=chunk) as opened:
        assert_same(opened(images(), labels()), salient, 1e-5)


def test_salient_features_of_the_true_class_and_of_its_probability() -> None:
    """Step by step: HiResCAM of a module that ends in the softmax of the true class."""

    class Ending(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: Tensor) -> Tensor:
            scores: Tensor = self.network(pixels)
            return scores if score == "logit" else scores.softmax(1)

    for score in ("logit", "probability"):
        expected: dict[str, Tensor] = {}
        for role, network in networks().items():
            layer = LAYERS["conv1"] if role == "teacher" else "conv1"
            ranked = kdx.hires_cam(Ending(network).eval(), images(), f"network.{layer}", labels()).scaled(SIZE)
            with torch.no_grad():
                _, expected[role] = FeatureGraph(network, [layer])(kdx.impute(images(), kdx.top_mask(ranked, 0.4)))
        settings: dict[str, Any] = {"features": "salient", "keep": 0.4, "salient_class": "true", "salient_score": score}
        with explainer(**settings) as opened:
            actual = opened(images(), labels()).layers["conv1"]
            embedded = opened(images(), torch.eye(5)[labels()], classes=labels()).layers["conv1"]
            with pytest.raises(KdxError, match="need the class of every image"):
                opened(images(), torch.eye(5)[labels()])
        for name, value in actual.scores.items():
            assert value.value == pytest.approx(score_of(name, expected).value, abs=1e-9)
            assert embedded.scores[name].value == pytest.approx(value.value, abs=1e-12)


def test_published_salient_features_step_by_step() -> None:
    """The steps of docs/published.md in NumPy, with each network's pixels ranked at its deepest layer, and its own preprocessing undone."""
    mean, std = 0.4, 0.25
    features: dict[str, dict[str, Tensor]] = {layer: {} for layer in LAYERS}
    pixels, given = images().double(), {}
    for role, network in networks().items():
        double = network.double()
        given[role] = Network(role, double, Preprocessing(None, (mean,), (std,)))
        ending = nn.Sequential(double, nn.Softmax(1)).eval()
        deepest = list(LAYERS.values())[-1] if role == "teacher" else list(LAYERS)[-1]
        cam = kdx.hires_cam(ending, (pixels - mean) / std, f"0.{deepest}", labels()).at_size(SIZE).numpy()
        kept = 1 - cam < np.percentile(1 - cam, 50, axis=(1, 2), keepdims=True)
        kept[~kept.any((1, 2))] = True
        imputed = kdx.impute((pixels.numpy() - mean) / std, kept)
        spread = imputed.std((1, 2, 3), keepdims=True) + 1e-5
        shown = np.floor(255 * np.clip(0.1 * (imputed - imputed.mean((1, 2, 3), keepdims=True)) / spread + 0.5, 0, 1)) / 255
        with torch.no_grad():
            for layer, other in LAYERS.items():
                name = other if role == "teacher" else layer
                _, features[layer][role] = FeatureGraph(double, [name])(torch.from_numpy(shown))
    settings: dict[str, Any] = {"salient_class": "true", "salient_score": "probability", "salient_image": "published"}
    with explainer(**given, features="salient", **settings) as opened:
        actual = opened(pixels, labels())
    for layer, result in actual.layers.items():
        for name, value in result.scores.items():
            assert value.value == pytest.approx(score_of(name, features[layer]).value, abs=1e-6)


def test_references_map_and_salient_features_score(salient: Explanation[Any]) -> None:
    actual = []
    for settings in ({}, {"features": "salient", "keep": 0.4}):
        with explainer(**settings) as opened:
            opened.use_references(images(10, seed=5), torch.arange(10) % 4)
            actual.append(opened(images(), labels()))
    raw, scored = actual
    assert_same_maps(scored, raw, 0.0)
    for layer, result in scored.layers.items():
        assert result.scores == salient.layers[layer].scores and result.contrasts == salient.layers[layer].contrasts


def test_noise_in_salient_images_is_seeded(salient: Explanation[Any]) -> None:
    values = []
    for seed in (1, 1, 2):
        with explainer(features="salient", keep=0.4, noise=0.1, seed=seed) as opened:
            values.append([score.value for result in opened(images(), labels()).layers.values() for score in result.scores.values()])
    without = [score.value for result in salient.layers.values() for score in result.scores.values()]
    assert values[0] == values[1]
    assert np.abs(np.subtract(values[0], values[2])).max() > 1e-3 and np.abs(np.subtract(values[0], without)).max() > 1e-3


def test_noise_is_each_networks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that two networks' images share would raise their similarity."""
    seeds = []

    def recorded(self: Salience, pixels: Tensor, maps: Tensor, seed: int = 0, preprocessing: Preprocessing = Preprocessing()) -> Tensor:
        seeds.append(seed)
        return pixels

    monkeypatch.setattr(Salience, "images", recorded)
    with explainer(features="salient") as opened:
        for batch in range(2):
            opened.explain(images(), labels(), (3, batch))
    assert len(seeds) == len(set(seeds)) == 2 * len(LAYERS) * 3


@pytest.fixture(scope="module")
def gradients(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exported files of student and base, of features and of gradients."""
    path = tmp_path_factory.mktemp("gradients")
    for role in ("student", "base"):
        shutil.copy2(files(folder)[role], path)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    with explainer(runtime="onnx", folder=path, **pair_settings()) as opened:
        opened.open(SIZE)
    after = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert before.items() <= after.items(), "the files of features are used again"
    assert sorted(name.split("-")[0] for name in after if name.endswith(".gradients.onnx")) == ["base", "student"]
    return path


def pair_settings() -> dict[str, Any]:
    return {**named_networks(), "teacher": None, "layers": list(LAYERS), "features": "salient", "keep": 0.4}


@pytest.mark.slow
def test_onnx_gives_what_eager_gives_of_salient_features(gradients: Path, explained: Explanation[Any], salient: Explanation[Any]) -> None:
    modified = {path.name: path.stat().st_mtime_ns for path in gradients.iterdir()}
    with explainer(runtime="onnx", folder=gradients, chunk=5, **pair_settings()) as opened:
        actual = opened(images(), labels())
        assert opened.choice.runtime == "onnx"
    assert_scores_of_a_pair(actual, salient)
    for layer, result in actual.layers.items():
        close(result.distilled.maps, explained.layers[layer].distilled.maps, 1e-4)
    assert {path.name: path.stat().st_mtime_ns for path in gradients.iterdir()} == modified, "the files are kept, not written again"


def assert_scores_of_a_pair(actual: Explanation[Any], expected: Explanation[Any]) -> None:
    for layer, result in actual.layers.items():
        assert list(result.scores) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"]
        for name, score in result.scores.items():
            assert score.value == pytest.approx(expected.layers[layer].scores[name].value, abs=1e-4)


@pytest.mark.slow
def test_tensorrt_runs_engines_of_gradients(
    gradients: Path, tmp_path: Path, salient: Explanation[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = StandInEngines()
    engines.install(monkeypatch)
    shutil.copytree(gradients, tmp_path, dirs_exist_ok=True)
    with explainer(runtime="tensorrt", folder=tmp_path, chunk=5, **pair_settings()) as opened:
        assert_scores_of_a_pair(opened(images(), labels()), salient)
    assert sorted(engines.built) == ["base", "base.gradients", "student", "student.gradients"]
    assert set(engines.built.values()) == {((1, 5, 5), None)}


def test_auto_falls_back_where_gradients_cannot_be_exported(
    folder: Path, tmp_path: Path, salient: Explanation[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files(folder).values():
        shutil.copy2(file, tmp_path)
    monkeypatch.setattr("kdx.export.onnx_file._exported", refuse_export)
    with explainer(runtime="auto", folder=tmp_path, **named_networks(), features="salient", keep=0.4) as opened:
        opened.open(SIZE)
        actual = opened(images(), labels())
        assert opened.choice.runtime == "eager" and "No export in this test." in opened.choice.why
    assert_same(actual, salient, 1e-6)


class Normed(nn.Module):
    """A network with a layer whose scale a normalisation removes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.conv(images).permute(0, 2, 3, 1)).relu().mean((1, 2)))
        return logits


def test_a_layer_that_ranks_no_pixels_is_named() -> None:
    settings: dict[str, Any] = {"student": Normed(1), "base": Normed(2), "teacher": None, "features": "salient"}
    with explainer(layers=["conv"], **settings) as opened, pytest.raises(KdxError, match="HiResCAM at layer 'conv' is zero") as caught:
        opened(images(), labels())
    assert "normalisation that reads that layer" in caught.value.hint
    with explainer(layers=["norm"], **settings) as opened:
        assert math.isfinite(opened(images(), labels()).layers["norm"].rs.value)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"features": "salient", "keep": 0}, "share 0 of pixels", "0.5"),
        ({"features": "salient", "keep": 1.5}, "share 1.5 of pixels", "0.5"),
        ({"features": "salient", "noise": -1.0}, "noise -1.0", "0.01"),
        ({"keep": 0.3}, "apply only to salient features", "--features salient"),
        ({"noise": 0.1}, "apply only to salient features", "--features salient"),
        (
            {"features": "salient", **{role: f"{role}.onnx" for role in ("student", "base", "teacher")}},
            "files of features contain no gradients",
            "the networks themselves",
        ),
        (
            {"features": "salient", "file": "it.explainer.onnx", "student": None, "base": None, "teacher": None},
            "explainer file contains no gradients",
            "the networks themselves",
        ),
    ],
)
def test_salient_features_that_cannot_be_computed_are_refused_at_once(changes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(KdxError) as caught:
        explainer(**changes)
    assert message in caught.value.problem and hint in caught.value.hint


def test_images_whose_map_is_empty_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """A black image has no feature behind a ReLU of a convolution without bias, so its HiResCAM is zero everywhere."""

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        head = nn.Linear(4 * 10 * 7, 3)
        with torch.no_grad():
            head.weight.abs_()
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), head)

    pixels = torch.rand(8, 3, 12, 9, generator=torch.Generator().manual_seed(0))
    pixels[2] = 0
    options: dict[str, Any] = {"layers": ["1"], "runtime": "eager", "permutations": 0, "features": "salient"}
    with kdx.Explainer(student=network(0), base=network(1), **options) as explained, caplog.at_level("WARNING", logger="kdx"):
        for _ in range(2):
            explained(pixels, torch.arange(8) % 2)
    expected = "at 1 is zero everywhere for 1 of 8 images"
    assert [expected in record.getMessage() for record in caplog.records] == [True, True]  # the student's and the base's
