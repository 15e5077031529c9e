"""Distances between spatial means (``pooled``), in every geometry and in explainer files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.explain.graph import ReferenceImages, explainer_graph
from kdx.explain.layer import measure
from kdx.explain.settings import Settings
from kdx.explain.whole_set import measure_set
from kdx.export.graphs import Preprocessing
from kdx.features.target import Target
from kdx.kernels import reference
from kdx.roles import maps_among, pairs_among
from kdx.scores.uncertainty import permutation_table
from tests import oracle
from tests.explain import written_files
from tests.explain.small_networks import LAYERS, close, explainer, features, images, labels
from tests.explain.test_layer import roles
from tests.explain.test_whole_set import rows


def means(values: Tensor) -> Tensor:
    return values.double().mean((2, 3))


@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_maps_and_scores_of_an_explainer_are_those_of_the_means(objective: Any, weighting: Any) -> None:
    with explainer(pooled=True, objective=objective, weighting=weighting) as opened:
        actual = opened(images(), labels())
    target = nn.functional.one_hot(labels())
    for layer, result in actual.layers.items():
        by_role = {role: maps[layer] for role, maps in features().items()}
        for name, (explained, given) in pairs_among(by_role).items():
            _, weights, maps = reference.unicam(by_role[explained], by_role[given], target, objective, weighting, pooled=True)
            close(result.unicam[name].maps, maps, 1e-4)
            close(result.unicam[name].weights, weights, 1e-4)
        assert result.fss.value == pytest.approx(
            kdx.fss(means(by_role["student"]), means(by_role["teacher"]), permutations=0).value, abs=1e-6
        )
        expected = kdx.rs(means(by_role["student"]), labels(), means(by_role["base"]), permutations=19)
        assert result.scores["RS(S|B)"].value == pytest.approx(expected.value, abs=1e-6)
        assert result.scores["RS(S|B)"].interval == pytest.approx(expected.interval, abs=1e-5)
        assert not result.score_maps


def test_the_reference_geometry_compares_means() -> None:
    known, known_labels = images(10, seed=5), torch.arange(10) % 4
    with explainer(pooled=True) as opened:
        opened.use_references(known, known_labels)
        actual = opened(images(), labels())
    for layer in LAYERS:
        s, b = (features(known)[role][layer] for role in ("student", "base"))
        x, y = (features()[role][layer] for role in ("student", "base"))
        expected = kdx.unicam(x, y, labels(), pooled=True, reference=kdx.ReferenceSet(s, b, known_labels, pooled=True))
        close(actual.layers[layer].distilled.maps, expected.maps, 1e-4)


@pytest.mark.parametrize("unit", [1.0, 1e-25])
@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_the_whole_set_equals_one_batch(objective: Any, weighting: Any, unit: float) -> None:
    by_role, labels = roles(40)
    by_role = {role: values * unit for role, values in by_role.items()}
    target, maps = Target.of(labels), {}

    def output(name: str, shape: tuple[int, int, int]) -> Tensor:
        maps[name] = torch.full(shape, torch.nan, dtype=torch.float64)
        return maps[name]

    settings = Settings(permutations=9, objective=objective, weighting=weighting, pooled=True)
    actual = measure_set(rows(by_role), target, settings, output)
    assert set(maps) == set(maps_among(by_role)) == set(actual.statistics)
    for name, (explained, given) in pairs_among(by_role).items():
        expected = kdx.unicam(by_role[explained], by_role[given], labels, objective, weighting, pooled=True)
        assert oracle.error(maps[name], expected.maps) < 1e-9
    batch = measure({role: means(x)[:, :, None, None] for role, x in by_role.items()}, target, permutations=permutation_table(40, 0, 0))
    size = batch.products.diagonal().sqrt()
    assert oracle.error(actual.products / size / size[:, None], batch.products / size / size[:, None]) < 1e-9
    if objective == "relevance":
        assert set(actual.null) == set(maps)


def test_salient_features_are_pooled_too() -> None:
    results = []
    for pooled in (False, True):
        with explainer(features="salient", pooled=pooled) as opened:
            results.append(opened(images(), labels()).layers["conv2"])
    assert results[0].rs.value != results[1].rs.value
    with explainer(pooled=True) as opened:
        close(results[1].distilled.maps, opened(images(), labels()).layers["conv2"].distilled.maps, 1e-6)


@pytest.mark.parametrize("references", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_an_explainer_file_of_means(tmp_path: Path, references: bool) -> None:
    nets = {role: written_files.network(seed, 4 + seed, 3, Preprocessing()) for seed, role in enumerate(("student", "base"))}
    known = ReferenceImages(written_files.images(8, seed=3), torch.arange(8) % 3) if references else None
    graph = explainer_graph(nets, "layer2", known, pooled=True)
    origin = {role: kdx.export.description.Origin(net.reference, net.weights_hash) for role, net in nets.items()}
    path = tmp_path / "means.onnx"
    kdx.export.onnx_file.write(graph, path, origin=origin, image_size=written_files.FIXED)
    pixels, target = written_files.images(9), torch.arange(9) % 3
    with kdx.Explainer(file=path, pooled=True, permutations=9) as ours:
        actual = ours(pixels, target).layers["layer2"]
    with written_files.by_pytorch(nets, layers=["layer2"], pooled=True, permutations=9) as theirs:
        if known is not None:
            theirs.use_references(known.images, known.labels)
        expected = theirs(pixels, target).layers["layer2"]
    for name, maps in expected.unicam.items():
        assert written_files.worst(actual.unicam[name].maps, maps.maps) <= written_files.MAPS_AGREE
        assert written_files.worst(actual.unicam[name].weights, maps.weights) <= written_files.MAPS_AGREE
    for name, score in expected.scores.items():
        assert actual.scores[name].value == pytest.approx(score.value, abs=written_files.SCORES_AGREE)
    assert not actual.score_maps
    with pytest.raises(kdx.KdxError, match="measures distances between spatial means"):
        kdx.Explainer(file=path)
