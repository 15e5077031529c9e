"""The graph of an explainer file: the numbers of `kdx.unicam`, of the scores and of the definitions, in ONNX Runtime alone."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdx
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.export import engine
from kdx.export.description import describe
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.kernels import reference
from kdx.models.network import Network
from kdx.roles import ROLES, pairs_among, score_maps_among, scores_among
from kdx.scores.score import Score
from tests.explain.written_files import (
    CLASSES,
    FAINT_AGREE,
    FIXED,
    MAPS_AGREE,
    SCORES_AGREE,
    Written,
    by_definition,
    decomposed,
    embedding,
    images,
    network,
    one_hot,
    worst,
    written,
)

TARGETS: dict[str, Callable[[int], Tensor]] = {
    "2 classes": lambda n: one_hot(n, 2),
    "3 classes": lambda n: one_hot(n, 3),
    "embedding": lambda n: embedding(n, 11),
    "a number": lambda n: embedding(n, 1),
}

pytestmark = pytest.mark.slow
"""Exporting the files takes half a minute."""


def by_functions(features: Mapping[str, Tensor], target: Tensor) -> dict[str, Score]:
    letters = {role[0].upper(): feature for role, feature in features.items()}
    actual = {}
    for name in scores_among(features):
        kind, inside = name[:-1].split("(")
        if kind == "FSS":
            first, second = inside.split(",")
            actual[name] = kdx.fss(letters[first], letters[second], permutations=0)
        else:
            first, _, other = inside.partition("|")
            actual[name] = kdx.rs(letters[first], target, given=letters[other] if other else None, permutations=0)
    return actual


def assert_explained(file: Written, pixels: Tensor, target: Tensor) -> None:
    actual = file.run(pixels, target)
    logits, layers = file.eager(pixels)
    assert list(actual) == list(file.graph.output_names)
    for role in file.roles:
        assert worst(actual[f"logits/{role}"], logits[role]) <= MAPS_AGREE
    for layer, features in layers.items():
        distances = [reference.distances(features[role].double().flatten(1)) for role in file.roles]
        assert actual[f"{layer}/distances"].dtype == np.float32
        assert worst(actual[f"{layer}/distances"], torch.stack(distances)) <= MAPS_AGREE
        for name, (explained, given) in pairs_among(file.roles).items():
            expected = kdx.unicam(features[explained], features[given], target)
            assert worst(actual[f"{layer}/{name}/maps"], expected.maps) <= MAPS_AGREE
            assert worst(actual[f"{layer}/{name}/weights"], expected.weights) <= MAPS_AGREE
            assert (
                np.abs(actual[f"{layer}/{name}/scaled"] - expected.scaled((pixels.shape[2], pixels.shape[3])).numpy()).max() <= FAINT_AGREE
            )
        scores = dict(zip(describe(file.path).scores, actual[f"{layer}/scores"].tolist(), strict=True))
        assert scores == pytest.approx(by_definition(features, target), abs=SCORES_AGREE)
        assert_adds_up(actual, layer, features, target, scores)


def assert_adds_up(
    actual: Mapping[str, np.ndarray[Any, Any]], layer: str, features: Mapping[str, Tensor], target: Tensor, scores: Mapping[str, float]
) -> None:
    """Asserts that the score maps are those of `kdx.decompose` and that each adds up to its score."""
    for name, kind in score_maps_among(features).items():
        maps = actual[f"{layer}/{name}/maps"]
        expected = decomposed(kind, features, target)
        assert np.abs(maps - expected.maps.numpy()).max() <= MAPS_AGREE * float(expected.maps.abs().max())
        more, _, less = kind.score.partition(" - ")
        assert maps.astype(np.float64).sum() == pytest.approx(scores[more] - (scores[less] if less else 0), abs=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [5, 7, 16])
def test_an_explainer_file_is_unicam_and_the_scores(trio: Written, n: int, target: str) -> None:
    assert_explained(trio, images(n, (16, 12), seed=n), TARGETS[target](n))


def test_its_scores_are_those_of_the_functions(trio: Written) -> None:
    pixels, labels = images(9, (16, 12), seed=6), torch.arange(9) % 3
    actual = trio.run(pixels, torch.eye(3)[labels])
    for layer, features in trio.eager(pixels)[1].items():
        scores = dict(zip(scores_among(trio.roles), actual[f"{layer}/scores"].tolist(), strict=True))
        assert scores == pytest.approx({name: score.value for name, score in by_functions(features, labels).items()}, abs=SCORES_AGREE)


@pytest.mark.parametrize("size", [(15, 21), (12, 10), (33, 8)])
def test_images_of_any_size_are_resized_inside_and_maps_to_their_size(trio: Written, size: tuple[int, int]) -> None:
    assert_explained(trio, images(9, size), one_hot(9, 4))


@pytest.mark.parametrize("n", [5, 7, 16])
def test_without_a_teacher_and_of_one_size(pair: Written, n: int) -> None:
    assert pair.graph.output_names[2:] == (
        *(f"layer2/{name}/{what}" for name in ("distilled", "residual") for what in ("maps", "scaled", "weights")),
        *(f"layer2/{name}/maps" for name in ("rs_student", "rs_base", "rs_student_given_base", "rs_base_given_student")),
        "layer2/rs_student_minus_base/maps",
        "layer2/scores",
        "layer2/distances",
    )
    assert_explained(pair, images(n, seed=n), one_hot(n, 3))


@pytest.mark.parametrize("which", ["trio", "pair"])
def test_four_images_have_scores_and_no_maps(which: str, request: pytest.FixtureRequest) -> None:
    """Besides the given network's geometry, four images leave one dimension, in which relevance cannot change."""
    file: Written = request.getfixturevalue(which)
    few, more = (file.run(images(n, FIXED if which == "pair" else (16, 12), seed=4), one_hot(n, 2)) for n in (4, 16))
    _, layers = file.eager(images(4, FIXED if which == "pair" else (16, 12), seed=4))
    for layer, features in layers.items():
        assert dict(zip(describe(file.path).scores, few[f"{layer}/scores"].tolist(), strict=True)) == pytest.approx(
            by_definition(features, one_hot(4, 2)), abs=SCORES_AGREE
        )
        for name in pairs_among(file.roles):
            assert np.abs(few[f"{layer}/{name}/maps"]).max() <= MAPS_AGREE * more[f"{layer}/{name}/maps"].max()


def test_its_description(trio: Written, pair: Written) -> None:
    actual = describe(trio.path)
    assert (actual.kind, actual.layers, actual.scores, actual.image_size) == (
        "explainer",
        ("layer1", "relu"),
        tuple(scores_among(ROLES)),
        None,
    )
    assert actual.networks["teacher"].layers == ("layer2", "layer1.0.bn2") and actual.at is None
    for role, model in trio.networks.items():
        about = actual.networks[role]
        assert (about.reference, about.weights, about.parameters) == (model.reference, model.weights_hash, model.parameters)
        assert about.preprocessing == model.preprocessing
    assert actual.inputs == {"images": ("batch", 3, "height", "width"), "target": ("batch", "embedding")}
    shapes = {name: shape for name, shape in actual.outputs.items() if name.startswith("layer1/")}
    assert shapes["layer1/missed/maps"] == ("batch", 8, 6) and shapes["layer1/missed/weights"] == ("batch", 12)
    assert shapes["layer1/distilled/scaled"] == ("batch", "height", "width")
    assert shapes["layer1/scores"] == (9,) and shapes["layer1/distances"] == (3, "batch", "batch")
    alone = describe(pair.path)
    assert (alone.classes, alone.image_size) == (CLASSES, FIXED)
    assert alone.scores == ("RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)")
    assert alone.outputs["layer2/distilled/scaled"] == ("batch", *FIXED)


def test_an_image_twice_in_a_batch_has_distance_zero_to_itself(trio: Written) -> None:
    pixels, target = images(8, (16, 12), seed=5), one_hot(8, 2)
    pixels[6] = pixels[2]
    actual = trio.run(pixels, target)
    assert all(np.isfinite(values).all() for values in actual.values())
    for layer in trio.layers:
        distances = actual[f"{layer}/distances"]
        assert (distances[:, 2, 6] == 0).all() and (distances[:, 6, 2] == 0).all()
        assert (np.diagonal(distances, axis1=1, axis2=2) == 0).all()
        assert (distances[:, 2, 7] > 0).all()
    assert_explained(trio, pixels, target)


def test_a_map_of_networks_that_differ_by_rounding_is_zero(tmp_path: Path) -> None:
    networks = {role: network(0, 3, 3, Preprocessing(), stages=1) for role in ("student", "base")}
    with torch.no_grad():
        for parameter in networks["base"].module.parameters():
            parameter.copy_(torch.nextafter(parameter, 2 * parameter))
    twins = written(tmp_path, networks, {"layer1": "layer1"}, FIXED, tolerance=math.inf)  # a score of rounding is rounding
    actual = twins.run(images(9), one_hot(9, 3))
    for name in ("distilled", "residual"):
        for what in ("maps", "scaled", "weights"):
            assert not actual[f"layer1/{name}/{what}"].any()
    assert not actual["layer1/rs_student_given_base/maps"].any() and not actual["layer1/rs_base_given_student/maps"].any()
    assert actual["layer1/rs_student/maps"].any()
    assert actual["layer1/distances"].any() and np.isfinite(actual["layer1/distances"]).all()
    for arguments in ({"file": twins.path}, {**networks, "layers": "layer1", "runtime": "eager"}):
        with Explainer(**arguments) as explainer, pytest.raises(KdxError, match="explain"):
            explainer(images(9), torch.arange(9) % 3)


ALONE = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
feeds = {entry.name: np.load(f"{entry.name}.npy") for entry in session.get_inputs()}
np.savez("outputs.npz", **{name.replace("/", "|"): value for name, value in zip(names, session.run(None, feeds))})
strangers = {name.split(".")[0] for name in sys.modules} & {"torch", "kdx", "onnx", "onnxscript"}
assert not strangers, strangers
"""


def test_onnx_runtime_alone_makes_the_maps(trio: Written, tmp_path: Path) -> None:
    pixels, labels = images(10, (20, 14), seed=3), torch.arange(10) % 3
    np.save(tmp_path / "images.npy", pixels.numpy())
    np.save(tmp_path / "target.npy", np.eye(3, dtype=np.float32)[labels.numpy()])
    done = subprocess.run([sys.executable, "-c", ALONE, trio.path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "outputs.npz") as content:
        actual = {name.replace("|", "/"): content[name] for name in content.files}
    _, layers = trio.eager(pixels)
    for layer, features in layers.items():
        for name, (explained, given) in pairs_among(ROLES).items():
            expected = kdx.unicam(features[explained], features[given], labels)
            assert worst(actual[f"{layer}/{name}/maps"], expected.maps) <= MAPS_AGREE


@pytest.fixture(scope="module")
def half(pair: Written, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("half"), pair.networks, pair.layers, FIXED, "fp16")


def test_in_float16_the_geometry_is_float32s(half: Written) -> None:
    pixels, target = images(12, seed=8), one_hot(12, 3)
    actual = half.run(pixels, target)
    assert all(values.dtype == np.float32 for values in actual.values())
    networks = {role: FeatureGraph(network.module.half(), ["layer2"]) for role, network in _copies(half).items()}
    with torch.no_grad():
        features = {role: graph(pixels)[1] for role, graph in networks.items()}
    scores = dict(zip(describe(half.path).scores, actual["layer2/scores"].tolist(), strict=True))
    assert scores == pytest.approx(by_definition(features, target), abs=2e-3)  # the networks' own rounding, of 11 bits
    distances = torch.stack([reference.distances(features[role].double().flatten(1)) for role in half.roles])
    assert worst(actual["layer2/distances"], distances) <= 2e-3


def _copies(file: Written) -> dict[str, Network]:
    return {role: replace(network, module=copy.deepcopy(network.module)) for role, network in file.networks.items()}


def test_the_same_export_is_the_same_file(pair: Written, tmp_path: Path) -> None:
    again = written(tmp_path / "elsewhere", _copies(pair), pair.layers, FIXED)
    content = again.path.read_bytes()
    assert content == pair.path.read_bytes()
    for where in (str(tmp_path), "/site-packages", str(Path.cwd())):
        assert where.encode() not in content


@pytest.mark.parametrize(("which", "arch"), [("trio", "sm_86"), pytest.param("half", "sm_120", marks=pytest.mark.slow)])
def test_an_engine_of_an_explainer_takes_targets_of_one_width(
    which: str, arch: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    file: Written = request.getfixturevalue(which)
    size = (14, 18) if which == "trio" else None
    with pytest.raises(KdxError, match="cannot take batches of 3"):
        engine.build(file.path, tmp_path / "x.engine", batch=(3, 8, 8), arch=arch, image_size=size)
    actual = engine.build(file.path, tmp_path / "x.engine", batch=(4, 8, 8), arch=arch, image_size=size)
    classes = len(CLASSES) if which == "half" else 5
    assert actual.kind == "explainer" and actual.inputs == {"images": ("batch", 3, *(size or FIXED)), "target": ("batch", classes)}
    assert actual.outputs[f"{actual.layers[0]}/distilled/scaled"] == ("batch", *(size or FIXED))
    assert actual.outputs[f"{actual.layers[0]}/distances"] == (len(file.roles), "batch", "batch")
    assert actual.file == describe(file.path) and (tmp_path / "x.engine").read_bytes()[:4] == b"vtrt"
