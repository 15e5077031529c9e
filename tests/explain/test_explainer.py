"""The explainer against kdx.unicam, kdx.fss and kdx.rs on the same features; its runtimes, inputs, references and manners."""

from __future__ import annotations

import copy
import gc
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx import Explainer, KdxError
from kdx.explain.explainer import Explanation
from kdx.explain.networks import NetworkLike, NetworkRunners
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.maps.salient_images import Salience
from kdx.models.network import Network
from kdx.roles import MAPS
from kdx.runtimes.choice import Choice
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from kdx.scores.score import Score

LAYERS = {"conv1": "stem", "conv2": "conv2"}
SIZE = (11, 9)
N = 13

EXPLAINED = {
    "distilled": ("student", "base"),
    "residual": ("base", "student"),
    "missed": ("teacher", "student"),
    "new": ("student", "teacher"),
}
PAIRS = {"S": "student", "B": "base", "T": "teacher"}


class Small(nn.Module):
    """Two convolutions; a teacher is wider and calls its first one ``stem``."""

    def __init__(self, seed: int, *, teacher: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = "stem" if teacher else "conv1"
        width = 7 if teacher else 5
        self.add_module(self.first, nn.Conv2d(3, width, 3, padding=1))
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.get_submodule(self.first)(images)).relu()
        logits: Tensor = self.fc(self.conv2(features).relu().mean((2, 3)))
        return logits


class Untraceable(Small):
    """Runs, and cannot be exported."""

    def forward(self, images: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise RuntimeError("no tracing here")
        return super().forward(images)


def networks() -> dict[str, nn.Module]:
    return {"student": Small(1).eval(), "base": Small(2).eval(), "teacher": Small(3, teacher=True).eval()}


def named() -> dict[str, Network]:
    """The networks under names, so that an explainer knows them again."""
    return {role: Network("Small", network, Preprocessing()) for role, network in networks().items()}


def explainer(**changes: Any) -> Explainer:
    settings: dict[str, Any] = {**networks(), "layers": LAYERS, "runtime": "eager", "permutations": 19}
    return Explainer(**settings | changes)


def images(n: int = N, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def labels(n: int = N) -> Tensor:
    return torch.arange(n) % 3


def features(pixels: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
    """Each role's features of pixels (of images() by default) by the student's layer, in PyTorch."""
    found = {}
    for role, network in networks().items():
        names = LAYERS.values() if role == "teacher" else LAYERS
        with torch.no_grad():
            _, *maps = FeatureGraph(network, list(names))(images() if pixels is None else pixels)
        found[role] = dict(zip(LAYERS, maps, strict=True))
    return found


def score_of(name: str, known: Mapping[str, Tensor]) -> Score:
    """The score of a name, of each role's features, by kdx's own functions."""
    kind, _, inside = name.removesuffix(")").partition("(")
    if kind == "FSS":
        one, other = inside.split(",")
        return kdx.fss(known[PAIRS[one]], known[PAIRS[other]], permutations=19)
    one, _, other = inside.partition("|")
    return kdx.rs(known[PAIRS[one]], labels(), known[PAIRS[other]] if other else None, permutations=19)


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Within ``tolerance`` of the expected array's largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def assert_same(found: Explanation, expected: Explanation, tolerance: float) -> None:
    assert list(found.layers) == list(expected.layers)
    for layer, one in found.layers.items():
        other = expected.layers[layer]
        for name in MAPS:
            close(getattr(one, name).maps, getattr(other, name).maps, tolerance)
            close(getattr(one, name).weights, getattr(other, name).weights, tolerance)
            assert getattr(one, name).score == pytest.approx(getattr(other, name).score, abs=tolerance)
        for name, score in one.scores.items():
            assert score.value == pytest.approx(other.scores[name].value, abs=tolerance)
            assert score.interval == pytest.approx(other.scores[name].interval, abs=10 * tolerance)
            assert (score.n, score.permutations) == (N, 19)
    for role, logits in found.logits.items():
        close(logits, expected.logits[role], tolerance)


@pytest.fixture(scope="session")
def eager() -> Iterator[Explainer]:
    with explainer() as opened:
        yield opened


@pytest.fixture(scope="session")
def explained(eager: Explainer) -> Explanation:
    return eager(images(), labels())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files that an explainer exported."""
    path = tmp_path_factory.mktemp("networks")
    with explainer(runtime="onnx", folder=path, **named()) as opened:
        opened.open(SIZE)
    return path


# ---- against the functions that it is made of ----


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MAPS)
def test_its_maps_are_unicams(explained: Explanation, layer: str, name: str) -> None:
    known = features()
    one, other = EXPLAINED[name]
    expected = kdx.unicam(known[one][layer], known[other][layer], labels())
    found = getattr(explained.layers[layer], name)
    close(found.maps, expected.maps, 1e-4)
    close(found.weights, expected.weights, 1e-4)
    assert found.score == pytest.approx(expected.score, abs=1e-6)


@pytest.mark.parametrize("settings", [{"weighting": "elementwise"}, {"objective": "uniqueness"}])
def test_other_objectives_and_weightings_are_unicams_too(settings: dict[str, Any]) -> None:
    known = features()
    with explainer(**settings) as opened:
        found = opened(images(), labels()).layers["conv2"]
    expected = kdx.unicam(known["teacher"]["conv2"], known["student"]["conv2"], labels(), **settings)
    assert found.missed is not None
    close(found.missed.maps, expected.maps, 1e-4)
    close(found.missed.weights, expected.weights, 1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_its_scores_are_fss_and_rs(explained: Explanation, layer: str) -> None:
    known = {role: maps[layer] for role, maps in features().items()}
    result = explained.layers[layer]
    for name, score in result.scores.items():
        expected = score_of(name, known)
        assert score.value == pytest.approx(expected.value, abs=1e-9)
        assert score.interval == pytest.approx(expected.interval, abs=1e-7)
        assert score.p_value == pytest.approx(expected.p_value)
    assert result.fss is result.scores["FSS(S,T)"] and result.rs is result.scores["RS(S)"]
    assert len(result.scores) == 9
    for name, (value, (low, high)) in result.contrasts.items():
        more, less = name.split(" - ")
        assert value == pytest.approx(result.scores[more].value - result.scores[less].value, abs=1e-12) and low <= value <= high


def test_its_logits_are_the_networks(explained: Explanation) -> None:
    for role, network in networks().items():
        with torch.no_grad():
            close(explained.logits[role], network(images()), 1e-6)


def test_an_embedding_of_the_labels_is_the_labels(eager: Explainer, explained: Explanation) -> None:
    assert_same(eager(images(), nn.functional.one_hot(labels()).double()), explained, 1e-6)


# ---- without a teacher ----


def assert_without_teacher(found: Explanation, expected: Explanation, tolerance: float) -> None:
    """``found`` is the part of ``expected`` that no teacher is needed for."""
    assert set(found.logits) == {"student", "base"}
    for layer, result in found.layers.items():
        assert result.missed is None and result.new is None
        assert list(result.scores) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"] and list(result.contrasts) == ["RS(S|B) - RS(B|S)"]
        for name, score in result.scores.items():
            whole = expected.layers[layer].scores[name]
            assert score.value == pytest.approx(whole.value, abs=tolerance) and score.p_value == whole.p_value
            assert score.interval == pytest.approx(whole.interval, abs=10 * tolerance)
        for name in ("distilled", "residual"):
            close(getattr(result, name).maps, getattr(expected.layers[layer], name).maps, tolerance)
        with pytest.raises(KdxError, match="there is none"):
            _ = result.fss
        assert result.rs is result.scores["RS(S)"]


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_without_a_teacher_the_rest_stays_as_it_is(explained: Explanation, runtime: str) -> None:
    with explainer(teacher=None, layers=list(LAYERS), runtime=runtime) as opened:
        assert_without_teacher(opened(images(), labels()), explained, 1e-4)
        assert list(opened.networks()) == ["student", "base"]


def test_two_files_without_a_teacher(folder: Path, explained: Explanation) -> None:
    with explainer(**files(folder) | {"teacher": None}, layers=list(LAYERS), runtime="auto") as opened:
        assert_without_teacher(opened(images(), labels()), explained, 1e-4)


def test_references_without_a_teacher() -> None:
    found = []
    for settings in ({}, {"teacher": None, "layers": list(LAYERS)}):
        with explainer(**settings) as opened:
            opened.use_references(images(10, seed=5), torch.arange(10) % 4)
            found.append(opened(images(), labels()))
    assert_without_teacher(found[1], found[0], 1e-6)


# ---- properties ----


def test_numpy_in_numpy_out(eager: Explainer, explained: Explanation) -> None:
    found = eager(images().numpy(), labels().numpy())
    for result in found.layers.values():
        for name in MAPS:
            assert isinstance(getattr(result, name).maps, np.ndarray) and isinstance(getattr(result, name).weights, np.ndarray)
    assert all(isinstance(logits, np.ndarray) for logits in found.logits.values())
    assert isinstance(explained.layers["conv1"].distilled.maps, Tensor) and isinstance(explained.logits["base"], Tensor)
    assert_same(found, explained, 1e-6)


def test_numpys_own_float64_is_taken(eager: Explainer, explained: Explanation) -> None:
    assert_same(eager(images().double().numpy(), labels().numpy()), explained, 1e-6)


def test_images_of_any_layout_are_taken(eager: Explainer, explained: Explanation) -> None:
    turned = np.ascontiguousarray(images().permute(0, 2, 3, 1).numpy()).transpose(0, 3, 1, 2)
    assert_same(eager(turned, labels().numpy()), explained, 1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 12, 13, 99])
def test_the_chunk_changes_nothing(explained: Explanation, chunk: int) -> None:
    with explainer(chunk=chunk) as opened:
        assert_same(opened(images(), labels()), explained, 1e-5)


def test_permuting_the_batch_permutes_the_maps(eager: Explainer, explained: Explanation) -> None:
    order = torch.from_numpy(np.random.default_rng(0).permutation(N))
    found = eager(images()[order], labels()[order])
    for layer, result in found.layers.items():
        for name in MAPS:
            close(getattr(result, name).maps, getattr(explained.layers[layer], name).maps[order], 1e-5)
        for name, score in result.scores.items():
            assert score.value == pytest.approx(explained.layers[layer].scores[name].value, abs=1e-6)


def test_the_same_call_gives_the_same_result(eager: Explainer, explained: Explanation) -> None:
    assert_same(eager(images(), labels()), explained, 0.0)


# ---- reference mode ----


def test_a_referenced_map_is_the_images_own(explained: Explanation) -> None:
    """Whatever stands beside it, an image's map is the last row of a plain unicam of the references and it alone."""
    references, named = images(10, seed=5), torch.arange(10) % 4
    with explainer() as opened:
        opened.use_references(references, named)
        found = opened(images(), labels())
        fewer = opened(images()[3:9], labels()[3:9])
    known = features(torch.cat([references, images()]))
    for layer in LAYERS:
        for name, (one, other) in EXPLAINED.items():
            maps, weights = getattr(found.layers[layer], name).maps, getattr(found.layers[layer], name).weights
            close(getattr(fewer.layers[layer], name).maps, maps[3:9], 1e-5)
            scores = []
            for image in range(N):
                rows = [*range(10), 10 + image]
                alone = kdx.unicam(known[one][layer][rows], known[other][layer][rows], torch.cat([named, labels()[image : image + 1]]))
                close(maps[image], alone.maps[-1], 1e-3)
                close(weights[image], alone.weights[-1], 1e-3)
                scores.append(alone.score)
            assert getattr(found.layers[layer], name).score == pytest.approx(np.mean(scores), abs=1e-5)
        for name, score in found.layers[layer].scores.items():  # scores stay the batch's
            assert score.value == pytest.approx(explained.layers[layer].scores[name].value, abs=1e-9)


def test_a_label_that_no_reference_has_is_a_class_of_its_own() -> None:
    with explainer() as opened:
        opened.use_references(images(10, seed=5), torch.arange(10) % 2)
        found, other = (opened(images(), labels() + shift).layers["conv2"].distilled for shift in (7, 70))
        known = opened(images(), labels() % 2).layers["conv2"].distilled
    close(found.maps, other.maps, 1e-6)
    assert not torch.allclose(found.maps, known.maps)


@pytest.mark.parametrize("n", [9, 11])
def test_references_without_a_label_each_are_refused(n: int) -> None:
    with explainer() as opened, pytest.raises(KdxError, match=f"{n} rows of reference labels and 10 of reference images"):
        opened.use_references(images(10), labels(n))


def test_references_of_one_class_are_refused() -> None:
    with explainer() as opened, pytest.raises(KdxError, match="one class"):
        opened.use_references(images(10), torch.zeros(10, dtype=torch.int64))


# ---- salient features ----


def salient_features(keep: float) -> dict[str, dict[str, Tensor]]:
    """Each role's features of its own salient images by the student's layer, step by step in PyTorch."""
    found: dict[str, dict[str, Tensor]] = {}
    for role, network in networks().items():
        found[role] = {}
        for layer, other in LAYERS.items():
            name = other if role == "teacher" else layer
            ranked = kdx.hires_cam(network, images(), name).scaled(SIZE)
            with torch.no_grad():
                _, found[role][layer] = FeatureGraph(network, [name])(kdx.impute(images(), kdx.top_mask(ranked, keep)))
    return found


def assert_same_maps(found: Explanation, expected: Explanation, tolerance: float) -> None:
    for layer, one in found.layers.items():
        for name in MAPS:
            close(getattr(one, name).maps, getattr(expected.layers[layer], name).maps, tolerance)
            assert getattr(one, name).score == pytest.approx(getattr(expected.layers[layer], name).score, abs=tolerance)


@pytest.fixture(scope="session")
def salient() -> Explanation:
    with explainer(features="salient", keep=0.4) as opened:
        return opened(images(), labels())


def test_scores_are_those_of_salient_features_and_maps_those_of_raw_ones(explained: Explanation, salient: Explanation) -> None:
    assert_same_maps(salient, explained, 0.0)
    known = salient_features(0.4)
    for layer, result in salient.layers.items():
        of = {role: known[role][layer] for role in known}
        for name, score in result.scores.items():
            expected = score_of(name, of)
            assert score.value == pytest.approx(expected.value, abs=1e-9)
            assert score.interval == pytest.approx(expected.interval, abs=1e-7)
            assert score.p_value == expected.p_value
            assert abs(score.value - explained.layers[layer].scores[name].value) > 1e-3
        for name, (value, (low, high)) in result.contrasts.items():
            more, less = name.split(" - ")
            assert value == pytest.approx(result.scores[more].value - result.scores[less].value, abs=1e-12) and low <= value <= high


@pytest.mark.parametrize("chunk", [1, 5])
def test_the_chunk_changes_no_score_of_salient_features(salient: Explanation, chunk: int) -> None:
    with explainer(features="salient", keep=0.4, chunk=chunk) as opened:
        assert_same(opened(images(), labels()), salient, 1e-5)


def test_references_map_and_salient_features_score(salient: Explanation) -> None:
    found = []
    for settings in ({}, {"features": "salient", "keep": 0.4}):
        with explainer(**settings) as opened:
            opened.use_references(images(10, seed=5), torch.arange(10) % 4)
            found.append(opened(images(), labels()))
    raw, scored = found
    assert_same_maps(scored, raw, 0.0)
    for layer, result in scored.layers.items():
        assert result.scores == salient.layers[layer].scores and result.contrasts == salient.layers[layer].contrasts


def test_noise_in_salient_images_is_seeded(salient: Explanation) -> None:
    values = []
    for seed in (1, 1, 2):
        with explainer(features="salient", keep=0.4, noise=0.1, seed=seed) as opened:
            values.append([score.value for result in opened(images(), labels()).layers.values() for score in result.scores.values()])
    without = [score.value for result in salient.layers.values() for score in result.scores.values()]
    assert values[0] == values[1]
    assert np.abs(np.subtract(values[0], values[2])).max() > 1e-3 and np.abs(np.subtract(values[0], without)).max() > 1e-3


def test_noise_is_each_networks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two networks' images had in common would read as likeness."""
    seeds = []

    def recorded(self: Salience, pixels: Tensor, maps: Tensor, seed: int = 0) -> Tensor:
        seeds.append(seed)
        return pixels

    monkeypatch.setattr(Salience, "images", recorded)
    with explainer(features="salient") as opened:
        for batch in range(2):
            opened.explain(images(), labels(), (3, batch))
    assert len(seeds) == len(set(seeds)) == 2 * len(LAYERS) * 3


@pytest.fixture(scope="module")
def gradients(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported files of student and base, and those of their gradients."""
    path = tmp_path_factory.mktemp("gradients")
    for role in ("student", "base"):
        shutil.copy2(files(folder)[role], path)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    with explainer(runtime="onnx", folder=path, **pair()) as opened:
        opened.open(SIZE)
    held = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert before.items() <= held.items(), "the files of features are used again"
    assert sorted(name.split("-")[0] for name in held if name.endswith(".gradients.onnx")) == ["base", "student"]
    return path


def pair() -> dict[str, Any]:
    return {**named(), "teacher": None, "layers": list(LAYERS), "features": "salient", "keep": 0.4}


def test_onnx_gives_what_eager_gives_of_salient_features(gradients: Path, explained: Explanation, salient: Explanation) -> None:
    modified = {path.name: path.stat().st_mtime_ns for path in gradients.iterdir()}
    with explainer(runtime="onnx", folder=gradients, chunk=5, **pair()) as opened:
        found = opened(images(), labels())
        assert opened.choice.runtime == "onnx"
    assert_scores_of_a_pair(found, salient)
    for layer, result in found.layers.items():
        close(result.distilled.maps, explained.layers[layer].distilled.maps, 1e-4)
    assert {path.name: path.stat().st_mtime_ns for path in gradients.iterdir()} == modified, "the files are kept, not written again"


def assert_scores_of_a_pair(found: Explanation, expected: Explanation) -> None:
    for layer, result in found.layers.items():
        assert list(result.scores) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"]
        for name, score in result.scores.items():
            assert score.value == pytest.approx(expected.layers[layer].scores[name].value, abs=1e-4)


def test_tensorrt_runs_engines_of_gradients(gradients: Path, tmp_path: Path, salient: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = _Engines()
    monkeypatch.setattr("kdx.explain.networks.choose", lambda *_, **__: Choice("tensorrt", torch.device("cpu"), "for a test"))
    monkeypatch.setattr("kdx.explain.exported.engine.build", engines.build)
    monkeypatch.setattr("kdx.explain.exported.open_file", engines.open)
    shutil.copytree(gradients, tmp_path, dirs_exist_ok=True)
    with explainer(runtime="tensorrt", folder=tmp_path, chunk=5, **pair()) as opened:
        assert_scores_of_a_pair(opened(images(), labels()), salient)
    assert sorted(engines.built) == ["base", "base.gradients", "student", "student.gradients"]
    assert set(engines.built.values()) == {((1, 5, 5), None)}


def test_auto_falls_back_where_gradients_cannot_be_exported(
    folder: Path, tmp_path: Path, salient: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files(folder).values():
        shutil.copy2(file, tmp_path)
    monkeypatch.setattr("kdx.export.onnx_file._exported", _refuse)
    with explainer(runtime="auto", folder=tmp_path, **named(), features="salient", keep=0.4) as opened:
        found = opened(images(), labels())
        assert opened.choice.runtime == "eager" and "No export in this test." in opened.choice.why
    assert_same(found, salient, 1e-6)


class Normed(nn.Module):
    """A layer whose scale a normalisation takes away."""

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
    ("changes", "said", "hint"),
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
def test_salient_features_that_there_cannot_be_are_refused_at_once(changes: dict[str, Any], said: str, hint: str) -> None:
    with pytest.raises(KdxError) as caught:
        explainer(**changes)
    assert said in caught.value.problem and hint in caught.value.hint


# ---- runtimes ----


def test_onnx_gives_what_eager_gives(folder: Path, explained: Explanation) -> None:
    modified = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len([name for name in modified if name.endswith(".onnx")]) == 3
    with explainer(runtime="onnx", folder=folder, chunk=5, **named()) as opened:
        found = opened(images(), labels())
        assert opened.choice.runtime == "onnx" and "as requested" in opened.choice.why
    assert_same(found, explained, 1e-4)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == modified, "the files are kept, not written again"


def files(folder: Path) -> dict[str, Path]:
    return {role: next(folder.glob(f"{role}-*.onnx")) for role in ("student", "base", "teacher")}


def test_three_files_give_what_eager_gives(folder: Path, explained: Explanation) -> None:
    given = files(folder)
    with explainer(runtime="auto", **given | {"base": str(given["base"])}) as opened:
        assert_same(opened(images(), labels()), explained, 1e-4)
        assert opened.choice.why == "onnx on the CPU: the networks are ONNX files"
        records = opened.networks()
    with explainer() as opened:
        expected = opened.networks()
    for role in records:
        assert replace(records[role], image_size=None) == expected[role]
        assert records[role].image_size == SIZE


def test_a_layer_that_a_file_does_not_hold_is_named(folder: Path) -> None:
    with pytest.raises(KdxError, match="does not hold the layer 'norm'") as caught:
        explainer(runtime="auto", layers=["norm"], **files(folder))
    assert "conv2" in caught.value.hint


class Smooth(Small):
    """The weights of a `Small` and other code."""

    def forward(self, images: Tensor) -> Tensor:
        first = nn.functional.gelu(self.norm(self.get_submodule(self.first)(images)))
        logits: Tensor = self.fc(nn.functional.gelu(self.conv2(first)).mean((2, 3)))
        return logits


def test_a_module_of_equal_weights_and_other_code_is_another_network(tmp_path: Path) -> None:
    for student in (Small(1).eval(), Smooth(1).eval()):
        with (
            explainer(student=student, runtime="onnx", folder=tmp_path) as opened,
            explainer(student=student) as other,
        ):
            assert_same(opened(images(), labels()), other(images(), labels()), 1e-4)


@pytest.mark.parametrize("role", ["student", "base", "teacher"])
def test_files_and_networks_do_not_mix(role: str) -> None:
    with pytest.raises(KdxError, match=f"Only the {role} is an exported file"):
        explainer(**{role: "there/is/none.onnx"})


def test_files_do_not_run_in_eager(folder: Path) -> None:
    with pytest.raises(KdxError, match="cannot run in PyTorch"):
        explainer(runtime="eager", **files(folder))


def test_onnx_and_engine_files_do_not_mix(folder: Path) -> None:
    with pytest.raises(KdxError, match=r"The networks are \.engine and \.onnx files"):
        explainer(runtime="auto", **files(folder) | {"base": "base.engine"})


def test_files_open_on_the_device_that_was_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("meta")
    opened_on = []
    monkeypatch.setattr("kdx.explain.networks.choose", lambda *_, **__: Choice("onnx", device, "for a test"))
    monkeypatch.setattr("kdx.explain.exported.open_file", lambda path, choice: opened_on.append(choice.device))
    for given in (named(), files(folder)):
        with explainer(runtime="auto", folder=folder, **given) as opened:
            opened.open(SIZE)
            assert isinstance(opened._networks, NetworkRunners)
            opened._networks._runners.clear()
    assert opened_on == [device] * 6


class _Engines:
    """Stands in for TensorRT: an engine is a note of its ONNX file, which ONNX Runtime then runs."""

    def __init__(self) -> None:
        self.built: dict[str, tuple[Any, Any]] = {}

    def build(self, path: Path, built: Path, *, batch: Any, image_size: Any) -> None:
        role, _, rest = built.stem.partition("-")
        self.built[role + Path(rest).suffix] = batch, image_size
        built.write_text(str(path))

    def open(self, path: Path, _: Choice) -> OnnxRuntimeRunner:
        assert path.suffix == ".engine"
        return OnnxRuntimeRunner(Path(path.read_text()))


@pytest.mark.parametrize("given", ["networks", "files"])
def test_tensorrt_runs_engines_of_the_exported_files(
    given: str, folder: Path, tmp_path: Path, explained: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = _Engines()
    monkeypatch.setattr("kdx.explain.networks.choose", lambda *_, **__: Choice("tensorrt", torch.device("cpu"), "for a test"))
    monkeypatch.setattr("kdx.explain.exported.engine.build", engines.build)
    monkeypatch.setattr("kdx.explain.exported.open_file", engines.open)
    sources: dict[str, Any] = {**files(folder)} if given == "files" else {**named()}
    with explainer(runtime="tensorrt", folder=tmp_path, chunk=5, **sources) as opened:
        assert_same(opened(images(), labels()), explained, 1e-4)
    assert engines.built == dict.fromkeys(("teacher", "student", "base"), ((1, 5, 5), None))  # the files say their size


def test_auto_falls_back_to_eager_and_says_why(tmp_path: Path, explained: Explanation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kdx")
    with explainer(runtime="auto", teacher=Untraceable(3, teacher=True), folder=tmp_path) as opened:
        found = opened(images(), labels())
        assert opened.choice.runtime == "eager" and "the export failed" in opened.choice.why and "no tracing here" in opened.choice.why
        assert opened.choice.why in caplog.text
    assert_same(found, explained, 1e-6)
    assert list(tmp_path.iterdir()) == []


def test_onnx_asked_for_by_name_does_not_fall_back(tmp_path: Path) -> None:
    with (
        explainer(runtime="onnx", teacher=Untraceable(3, teacher=True), folder=tmp_path) as opened,
        pytest.raises(KdxError, match="no tracing here"),
    ):
        opened(images(), labels())


def test_the_temporary_folder_goes_with_the_explainer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("kdx.explain.networks.holds", lambda *_: True)
    given = files(folder)
    monkeypatch.setattr("kdx.explain.exported.open_file", lambda path, _: _in_its_folder(path, given))
    with explainer(runtime="onnx", **named()) as opened:
        assert list(tmp_path.iterdir()) == [], "none is made before it is needed"
        opened.open(SIZE)
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    opened.close()


def _in_its_folder(path: Path, given: dict[str, Path]) -> OnnxRuntimeRunner:
    assert path.parent.is_dir() and path.parent.name.startswith("kdx-")
    return OnnxRuntimeRunner(given[path.name.split("-")[0]])


@pytest.mark.parametrize("used", [True, False])
def test_a_closed_explainer_does_not_run_and_holds_no_network(used: bool) -> None:
    with explainer() as opened:
        if used:
            opened(images(), labels())
        assert isinstance(opened._networks, NetworkRunners)
        module = weakref.ref(opened._networks._graphs["base"][0].module)
        assert module() is not None
    gc.collect()
    assert module() is None
    with pytest.raises(ValueError, match="closed"):
        opened(images(), labels())


# ---- manners ----


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_the_users_networks_are_left_as_they_were(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = networks()
    for index, network in enumerate(given.values()):
        network.train(index != 1)
        network.fc.weight.requires_grad_(index == 0)  # type: ignore[union-attr]
    before = copy.deepcopy(given)
    if runtime == "onnx":
        monkeypatch.setattr("kdx.export.onnx_file._exported", _refuse)
    with explainer(runtime="auto" if runtime == "onnx" else "eager", folder=tmp_path, **given) as opened:
        opened(images(), labels())
    for network, earlier in zip(given.values(), before.values(), strict=True):
        for module, unused in zip(network.modules(), earlier.modules(), strict=True):
            assert module.training == unused.training and not module._forward_hooks and not module._forward_pre_hooks
        for parameter, old in zip(network.parameters(), earlier.parameters(), strict=True):
            assert torch.equal(parameter, old) and parameter.requires_grad == old.requires_grad and parameter.device == old.device
            assert parameter.grad is None
        assert all(torch.equal(buffer, old) for buffer, old in zip(network.buffers(), earlier.buffers(), strict=True))


def _refuse(*_: object) -> None:
    raise KdxError("No export in this test.", "None.")


def test_a_network_brings_its_preprocessing(explained: Explanation) -> None:
    """Images of twice the size, each pixel four times over, come out of the resize as they were; mean and deviation undo a shift."""
    preprocessing = Preprocessing(SIZE, (0.25,), (0.5,))
    given = {role: Network(role, network, preprocessing) for role, network in networks().items()}
    large = (images() * 0.5 + 0.25).repeat_interleave(2, 2).repeat_interleave(2, 3)
    with explainer(**given) as opened:
        assert_same(opened(large, labels()), explained, 1e-4)
        assert {record.image_size for record in opened.networks().values()} == {SIZE}


def test_layers_by_one_name_are_the_mapping_onto_themselves() -> None:
    with explainer(layers=["conv2"]) as opened, explainer(layers={"conv2": "conv2"}) as other:
        assert opened.layers == other.layers == {"conv2": "conv2"}
        assert_same(opened(images(), labels()), other(images(), labels()), 0.0)


# ---- what it refuses ----


def wrong(n: int = N, **changes: Any) -> tuple[dict[str, Any], Any, Any]:
    return changes, images(n), labels(n)


def spoiled() -> nn.Module:
    network = Small(2).eval()
    with torch.no_grad():
        network.fc.weight[0, 0] = float("nan")
        network.conv2.weight[1, 0] = float("nan")
    return network


@pytest.mark.parametrize(
    ("changes", "pixels", "target", "said"),
    [
        (*wrong(base=Small(1)), "Nothing is left of the explained features"),
        (*wrong(base=spoiled()), "base's features are not finite"),
        ({}, images(), torch.full((N,), 2), "one class"),
        (*wrong(3), "at least 4 images; here are 3"),
        (*wrong(0), "at least 4 images; here are 0"),
        ({}, images(), labels(12), "12 rows of the target and 13 of images"),
        ({}, images()[:, :1], labels(), "shape [13, 1, 11, 9]"),
        ({}, images()[:, 0], labels(), "shape [13, 11, 9]"),
        ({}, images().flatten(1), labels(), "shape [13, 297]"),
        ({}, (images() * 255).to(torch.uint8), labels(), "type torch.uint8"),
        ({}, images().fill_(0.5), labels(), "constant"),
        ({}, torch.full((N, 3, *SIZE), float("nan")), labels(), "not finite"),
        ({}, images(), labels().float(), "The target has shape [13]"),
        ({}, np.array(["a"] * N), labels(), "not of numbers"),
    ],
)
def test_what_has_no_explanation_is_an_error_that_says_so(changes: dict[str, Any], pixels: Any, target: Any, said: str) -> None:
    with explainer(**changes) as opened, pytest.raises(KdxError) as caught:
        opened(pixels, target)
    assert said in caught.value.problem and caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": ["conv9"]}, "no layer 'conv9'"),
        ({"layers": ["conv1"]}, "no layer 'conv1'"),  # the teacher's is its stem
        ({"layers": {"stem": "stem"}}, "no layer 'stem'"),
        ({"layers": [""]}, "no layer ''"),
        ({"layers": []}, "No layer was named"),
        ({"layers": {}}, "No layer was named"),
        ({"layers": {"conv1": "stem", "conv2": "conv2"}, "teacher": None}, "conv1=stem pairs a layer with one of the teacher's"),
        ({"device": "tpu"}, "'tpu' cannot run here"),
        ({"runtime": "abacus"}, "no runtime 'abacus'"),
        ({"student": "kdx:resnot"}, "resnot"),
    ],
)
def test_what_cannot_run_is_refused_at_once(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KdxError) as caught:
        explainer(**changes)
    assert said in caught.value.problem and caught.value.hint


def test_who_names_no_layer_is_told_which_there_are(folder: Path) -> None:
    for settings in ({}, files(folder) | {"runtime": "auto"}):
        with pytest.raises(KdxError, match="No layer was named") as caught:
            explainer(layers=[], **settings)
        assert "conv2" in caught.value.hint and "stem" not in caught.value.hint


def test_random_weights_are_told() -> None:
    given = named()
    given["base"] = replace(given["base"], trained=False)
    with explainer(**given) as opened:
        assert {role: record.trained for role, record in opened.networks().items()} == {"teacher": True, "student": True, "base": False}


@pytest.mark.parametrize("changes", [{"objective": "beauty"}, {"weighting": "grad"}, {"features": "cooked"}])
def test_a_programmers_mistake_is_a_value_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        explainer(**changes)


def test_an_error_leaves_the_explainer_ready(eager: Explainer, explained: Explanation) -> None:
    with pytest.raises(KdxError):
        eager(images(), torch.zeros(N, dtype=torch.int64))
    assert_same(eager(images(), labels()), explained, 0.0)


def test_a_reference_and_a_module_may_stand_side_by_side() -> None:
    given: dict[str, NetworkLike] = dict.fromkeys(("student", "teacher"), "kdx:resnet,width=4,depth=1,stages=1,classes=5")
    with explainer(layers=["conv1"], **given, base=Small(2)) as opened:
        found = opened(images(), labels()).layers["conv1"]
    assert found.distilled.maps.shape == (N, 32, 32) and found.residual.maps.shape == (N, *SIZE)
