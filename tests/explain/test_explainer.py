"""The Explainer against kdx.unicam, kdx.fss and kdx.rs on the same features; its inputs, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx import Explainer, KdxError
from kdx.explain.networks import NetworkLike
from kdx.explain.results import Explanation
from kdx.export.graphs import Preprocessing
from kdx.models.network import Network
from kdx.roles import ROLES, pairs_among
from tests.explain.small_networks import (
    EXPLAINED,
    LAYERS,
    SIZE,
    N,
    Small,
    assert_same,
    close,
    explainer,
    features,
    files,
    images,
    labels,
    named_networks,
    networks,
    refuse_export,
    score_of,
)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", pairs_among(ROLES))
def test_its_maps_are_unicams(explained: Explanation[Any], layer: str, name: str) -> None:
    role_features = features()
    one, other = EXPLAINED[name]
    expected = kdx.unicam(role_features[one][layer], role_features[other][layer], labels())
    actual = getattr(explained.layers[layer], name)
    close(actual.maps, expected.maps, 1e-4)
    close(actual.weights, expected.weights, 1e-4)
    assert actual.score == pytest.approx(expected.score, abs=1e-6)


@pytest.mark.parametrize("settings", [{"weighting": "elementwise"}, {"objective": "uniqueness"}])
def test_other_objectives_and_weightings_are_unicams_too(settings: dict[str, Any]) -> None:
    role_features = features()
    with explainer(**settings) as opened:
        actual = opened(images(), labels()).layers["conv2"]
    expected = kdx.unicam(role_features["teacher"]["conv2"], role_features["student"]["conv2"], labels(), **settings)
    assert actual.missed is not None
    close(actual.missed.maps, expected.maps, 1e-4)
    close(actual.missed.weights, expected.weights, 1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_its_scores_are_fss_and_rs(explained: Explanation[Any], layer: str) -> None:
    role_features = {role: maps[layer] for role, maps in features().items()}
    result = explained.layers[layer]
    for name, score in result.scores.items():
        expected = score_of(name, role_features)
        assert score.value == pytest.approx(expected.value, abs=1e-9)
        assert score.interval == pytest.approx(expected.interval, abs=1e-7)
        assert score.p_value == pytest.approx(expected.p_value)
    assert result.fss is result.scores["FSS(S,T)"] and result.rs is result.scores["RS(S)"]
    assert len(result.scores) == 9
    for name, (value, (low, high)) in result.contrasts.items():
        more, less = name.split(" - ")
        assert value == pytest.approx(result.scores[more].value - result.scores[less].value, abs=1e-12) and low <= value <= high


def test_its_logits_are_the_networks(explained: Explanation[Any]) -> None:
    for role, network in networks().items():
        with torch.no_grad():
            close(explained.logits[role], network(images()), 1e-6)


def test_an_embedding_of_the_labels_is_the_labels(eager: Explainer, explained: Explanation[Any]) -> None:
    assert_same(eager(images(), nn.functional.one_hot(labels()).double()), explained, 1e-6)


def test_numpy_in_numpy_out(eager: Explainer, explained: Explanation[Any]) -> None:
    actual = eager(images().numpy(), labels().numpy())
    for result in actual.layers.values():
        for name in pairs_among(ROLES):
            assert isinstance(getattr(result, name).maps, np.ndarray) and isinstance(getattr(result, name).weights, np.ndarray)
    assert all(isinstance(logits, np.ndarray) for logits in actual.logits.values())
    assert isinstance(explained.layers["conv1"].distilled.maps, Tensor) and isinstance(explained.logits["base"], Tensor)
    assert_same(actual, explained, 1e-6)


def test_numpys_own_float64_is_taken(eager: Explainer, explained: Explanation[Any]) -> None:
    assert_same(eager(images().double().numpy(), labels().numpy()), explained, 1e-6)


def test_images_of_any_layout_are_taken(eager: Explainer, explained: Explanation[Any]) -> None:
    turned = np.ascontiguousarray(images().permute(0, 2, 3, 1).numpy()).transpose(0, 3, 1, 2)
    assert_same(eager(turned, labels().numpy()), explained, 1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 12, 13, 99])
def test_the_chunk_does_not_change_the_results(explained: Explanation[Any], chunk: int) -> None:
    with explainer(chunk=chunk) as opened:
        assert_same(opened(images(), labels()), explained, 1e-5)


def test_permuting_the_batch_permutes_the_maps(eager: Explainer, explained: Explanation[Any]) -> None:
    order = torch.from_numpy(np.random.default_rng(0).permutation(N))
    actual = eager(images()[order], labels()[order])
    for layer, result in actual.layers.items():
        for name in pairs_among(ROLES):
            close(getattr(result, name).maps, getattr(explained.layers[layer], name).maps[order], 1e-5)
        for name, score in result.scores.items():
            assert score.value == pytest.approx(explained.layers[layer].scores[name].value, abs=1e-6)


def test_the_same_call_gives_the_same_result(eager: Explainer, explained: Explanation[Any]) -> None:
    assert_same(eager(images(), labels()), explained, 0.0)


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_the_users_networks_are_left_as_they_were(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_networks = networks()
    for index, network in enumerate(user_networks.values()):
        network.train(index != 1)
        network.fc.weight.requires_grad_(index == 0)  # type: ignore[union-attr]
    before = copy.deepcopy(user_networks)
    if runtime == "onnx":
        monkeypatch.setattr("kdx.export.onnx_file._exported", refuse_export)
    with explainer(runtime="auto" if runtime == "onnx" else "eager", folder=tmp_path, **user_networks) as opened:
        opened.open(SIZE)
        opened(images(), labels())
    for network, earlier in zip(user_networks.values(), before.values(), strict=True):
        for module, unused in zip(network.modules(), earlier.modules(), strict=True):
            assert module.training == unused.training and not module._forward_hooks and not module._forward_pre_hooks
        for parameter, old in zip(network.parameters(), earlier.parameters(), strict=True):
            assert torch.equal(parameter, old) and parameter.requires_grad == old.requires_grad and parameter.device == old.device
            assert parameter.grad is None
        assert all(torch.equal(buffer, old) for buffer, old in zip(network.buffers(), earlier.buffers(), strict=True))


def test_a_network_brings_its_preprocessing(explained: Explanation[Any]) -> None:
    """The resize undoes a doubling of every pixel, and mean and deviation undo a shift and a scaling."""
    preprocessing = Preprocessing(SIZE, (0.25,), (0.5,))
    user_networks = {role: Network(role, network, preprocessing) for role, network in networks().items()}
    large = (images() * 0.5 + 0.25).repeat_interleave(2, 2).repeat_interleave(2, 3)
    with explainer(**user_networks) as opened:
        assert_same(opened(large, labels()), explained, 1e-4)
        assert {record.image_size for record in opened.networks().values()} == {SIZE}


def test_a_list_of_layers_maps_each_to_itself() -> None:
    with explainer(layers=["conv2"]) as opened, explainer(layers={"conv2": "conv2"}) as other:
        assert opened.layers == other.layers == {"conv2": "conv2"}
        assert_same(opened(images(), labels()), other(images(), labels()), 0.0)


def wrong(n: int = N, **changes: Any) -> tuple[dict[str, Any], Any, Any]:
    return changes, images(n), labels(n)


def spoiled() -> nn.Module:
    network = Small(2).eval()
    with torch.no_grad():
        network.fc.weight[0, 0] = float("nan")
        network.conv2.weight[1, 0] = float("nan")
    return network


@pytest.mark.parametrize(
    ("changes", "pixels", "target", "message"),
    [
        (*wrong(base=Small(1)), "Nothing is left of the explained features"),
        (*wrong(base=spoiled()), "base's features are not finite"),
        ({}, images(), torch.full((N,), 2), "one class"),
        (*wrong(3), "at least 4 images, and there are 3"),
        (*wrong(0), "shape [0, 3, 11, 9]"),
        ({}, images(), labels(12), "12 rows of labels or class embeddings and 13 of images"),
        ({}, images()[:, :1], labels(), "shape [13, 1, 11, 9]"),
        ({}, images()[:, 0], labels(), "shape [13, 11, 9]"),
        ({}, images().flatten(1), labels(), "shape [13, 297]"),
        ({}, (images() * 255).int(), labels(), "type torch.int32"),
        ({}, images(), None, "The images have no labels"),
        ({}, images().fill_(0.5), labels(), "constant"),
        ({}, torch.full((N, 3, *SIZE), float("nan")), labels(), "not finite"),
        ({}, images(), labels().float(), "The target has shape [13]"),
        ({}, np.array(["a"] * N), labels(), "not of numbers"),
        ({}, images(), ["a"] * N, "one class"),
    ],
)
def test_inputs_without_an_explanation_are_an_error(changes: dict[str, Any], pixels: Any, target: Any, message: str) -> None:
    with explainer(**changes) as opened, pytest.raises(KdxError) as caught:
        opened(pixels, target)
    assert message in caught.value.problem and caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["conv9"]}, "no layer 'conv9'"),
        ({"layers": ["conv1"]}, "no layer 'conv1'"),  # the teacher's is its stem
        ({"layers": {"stem": "stem"}}, "no layer 'stem'"),
        ({"layers": [""]}, "'' is not a layer"),
        ({"layers": []}, "No layer was named"),
        ({"layers": {}}, "No layer was named"),
        ({"layers": {"conv1": "stem", "conv2": "conv2"}, "teacher": None}, "conv1=stem names a layer of the teacher"),
        ({"device": "tpu"}, "'tpu' cannot run here"),
        ({"runtime": "abacus"}, "no runtime 'abacus'"),
        ({"student": "kdx:resnot"}, "resnot"),
    ],
)
def test_arguments_that_cannot_run_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KdxError) as caught:
        explainer(**changes)
    assert message in caught.value.problem and caught.value.hint


def test_without_a_layer_the_error_lists_the_layers(folder: Path) -> None:
    for settings in ({}, files(folder) | {"runtime": "auto"}):
        with pytest.raises(KdxError, match="No layer was named") as caught:
            explainer(layers=[], **settings)
        assert "conv2" in caught.value.hint and "stem" not in caught.value.hint


def test_random_weights_are_recorded() -> None:
    user_networks = named_networks()
    user_networks["base"] = replace(user_networks["base"], trained=False)
    with explainer(**user_networks) as opened:
        assert {role: record.trained for role, record in opened.networks().items()} == {"teacher": True, "student": True, "base": False}


@pytest.mark.parametrize("changes", [{"objective": "beauty"}, {"weighting": "grad"}, {"features": "cooked"}])
def test_a_programmers_mistake_is_a_value_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        explainer(**changes)


def test_an_error_leaves_the_explainer_ready(eager: Explainer, explained: Explanation[Any]) -> None:
    with pytest.raises(KdxError):
        eager(images(), torch.zeros(N, dtype=torch.int64))
    assert_same(eager(images(), labels()), explained, 0.0)


def test_a_model_reference_and_a_module_can_be_combined() -> None:
    user_networks: dict[str, NetworkLike] = dict.fromkeys(("student", "teacher"), "kdx:resnet,width=4,depth=1,stages=1,classes=5")
    with explainer(layers=["conv1"], **user_networks, base=Small(2)) as opened:
        actual = opened(images(), labels()).layers["conv1"]
    assert actual.distilled.maps.shape == (N, 32, 32) and actual.residual.maps.shape == (N, *SIZE)


def test_score_maps_are_those_of_decompose_and_add_up_to_the_scores(explained: Explanation[Any]) -> None:
    result = explained.layers["conv2"]
    s, b, t = (features()[role]["conv2"] for role in ("student", "base", "teacher"))
    values = {name: score.value for name, score in (result.scores | result.contrasts).items()}
    for symbol, expected in {
        "RS(S|B)": kdx.decompose(s, labels(), given=b),
        "RS(S) - RS(B)": kdx.decompose(s, labels(), minus=b),
        "FSS(S,T)": kdx.decompose(s, t),
        "FSS(T,S)": kdx.decompose(t, s),
    }.items():
        actual = result.score_maps[symbol]
        close(actual.maps, expected.maps, 1e-4)
        close(actual.explained, expected.explained, 1e-4)
        assert actual.score == pytest.approx(values.get(symbol, values["FSS(S,T)"]), abs=1e-4)
        assert actual.stability is not None and actual.stability.shape == (N,)
        assert float(torch.nan_to_num(actual.stability).abs().max()) <= 1 + 1e-9


def test_the_geometry_reference_needs_its_images_and_other_geometries_refuse_them() -> None:
    with explainer(geometry="reference") as opened:
        with pytest.raises(KdxError, match="needs reference images"):
            opened(images(), labels())
        opened.use_references(images(seed=1), labels())
        expected = opened(images(), labels()).layers["conv2"].distilled.maps
    with explainer() as opened:
        opened.use_references(images(seed=1), labels())
        close(opened(images(), labels()).layers["conv2"].distilled.maps, expected, 1e-9)
    for geometry in ("whole", "batch"):
        with explainer(geometry=geometry) as opened, pytest.raises(KdxError, match=f"the geometry {geometry}"):
            opened.use_references(images(seed=1), labels())
    with pytest.raises(ValueError, match="no geometry"):
        explainer(geometry="set")
