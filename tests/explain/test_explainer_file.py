"""Explainer files: the numbers of `kdx.unicam`, of the scores and of the definitions, in ONNX Runtime alone and through kdx."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import kdx
from kdx.choices import FilePrecision
from kdx.commands import explain
from kdx.data.batches import random_batches
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.explain.graph import explainer_graph
from kdx.export import engine, onnx_file, parity
from kdx.export.description import Origin, describe
from kdx.export.graphs import ExplainerGraph, FeatureGraph, Preprocessing
from kdx.kernels import reference
from kdx.models.network import Network
from kdx.models.resnet import resnet
from kdx.roles import MAPS, ROLES, SCORES, maps_among, scores_among
from kdx.runs import store
from kdx.runs.run import RunOptions
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from kdx.scores.score import Score
from tests import command_line as commands

MAPS_AGREE = 1e-4
"""Of an output's largest value: both sides are float32, and a residual is a difference of what it is taken from."""

FAINT_AGREE = 1e-3
"""Of each image's own largest value, which may be a hundredth of another's."""

SCORES_AGREE = 1e-5
"""Absolute, of correlations: float32 inner products of U-centred distances."""

CLASSES = ("cat", "dog", "owl")
FIXED = (12, 10)

# ---- the files ----


@dataclass(frozen=True)
class Written:
    path: Path
    graph: ExplainerGraph
    networks: dict[str, Network]
    layers: dict[str, str]

    @property
    def roles(self) -> tuple[str, ...]:
        return self.graph.roles

    def run(self, images: Tensor, target: Tensor) -> dict[str, NDArray[np.float32]]:
        """By ONNX Runtime's own interface."""
        session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {"images": images.numpy(), "target": target.numpy()}), strict=True))

    def eager(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Logits by role, and features by the student's layer and role."""
        with torch.no_grad():
            passed = {role: self.graph.network(role)(images) for role in self.roles}
        layers = {layer: {role: passed[role][1 + place] for role in self.roles} for place, layer in enumerate(self.layers)}
        return {role: outputs[0] for role, outputs in passed.items()}, layers


def network(seed: int, width: int, classes: int, preprocessing: Preprocessing, stages: int = 2) -> Network:
    torch.manual_seed(seed)
    return Network(f"kdx:resnet,width={width}@{seed}.pt", resnet(width, 1, classes, stages).eval(), preprocessing)


def written(
    folder: Path,
    networks: dict[str, Network],
    layers: dict[str, str],
    size: tuple[int, int],
    precision: FilePrecision = "fp32",
    tolerance: float = parity.TOLERANCE,
) -> Written:
    graph = explainer_graph(networks, layers)
    path = folder / "nets.explainer.onnx"
    origin = {role: Origin(each.reference, each.weights_hash) for role, each in networks.items()}
    classes = CLASSES if len(networks) == 2 else ()
    onnx_file.write(graph, path, origin=origin, image_size=size, classes=classes, precision=precision, tolerance=tolerance)
    return Written(path, graph, networks, layers)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Student and base with a wider teacher, whose layers have other names, at another size; images of any size."""
    own, teachers = Preprocessing((12, 10), (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)), Preprocessing((16, 12), (0.5,), (0.3,))
    networks = {
        "student": network(0, 4, 5, own, stages=1),
        "base": network(1, 4, 5, own, stages=1),
        "teacher": network(2, 6, 5, teachers),
    }
    return written(tmp_path_factory.mktemp("trio"), networks, {"layer1": "layer2", "relu": "layer1.0.bn2"}, (16, 12))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Student and base alone, which take images as they are, of one size."""
    networks = {"student": network(3, 4, 3, Preprocessing()), "base": network(4, 3, 3, Preprocessing())}
    return written(tmp_path_factory.mktemp("pair"), networks, {"layer2": "layer2"}, FIXED)


def images(n: int, size: tuple[int, int] = FIXED, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size, mode="bilinear") * 0.7 + 0.3 * torch.rand(n, 3, *size, generator=generator)


def one_hot(n: int, classes: int) -> Tensor:
    return torch.eye(classes)[torch.arange(n) % classes]


def embedding(n: int, width: int) -> Tensor:
    """Of four classes, every image a little apart from its class."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, width, generator=generator)[torch.arange(n) % 4] + 0.1 * torch.randn(n, width, generator=generator)


TARGETS: dict[str, Callable[[int], Tensor]] = {
    "2 classes": lambda n: one_hot(n, 2),
    "3 classes": lambda n: one_hot(n, 3),
    "embedding": lambda n: embedding(n, 11),
    "a number": lambda n: embedding(n, 1),
}

# ---- agreement ----


def worst(found: Any, expected: Any) -> float:
    """The largest error over the largest value; infinite where an image's error is too large for the image's own largest value."""
    a, b = (np.asarray(each, dtype=np.float64).reshape(len(each), -1) for each in (found, expected))
    assert a.shape == b.shape
    errors, largest = np.abs(a - b).max(1), np.abs(b).max(1)
    faint = largest <= 1e-3 * largest.max()  # nothing but rounding, or near it
    return float(errors.max() / largest.max()) if (faint | (errors <= FAINT_AGREE * largest)).all() else float("inf")


def by_definition(features: Mapping[str, Tensor], target: Tensor) -> dict[str, float]:
    """Every score in float64, in the order of the paper."""
    rows = {role: feature.double().flatten(1) for role, feature in features.items()} | {"target": target.double()}
    centred = {name: reference.u_centered(reference.distances(each)) for name, each in rows.items()}
    found = {}
    for name, definition in scores_among(features).items():
        score = reference.semipartial if len(definition.matrices) == 3 else reference.correlation
        found[name] = float(score(*(centred[matrix] for matrix in definition.matrices)))
    return found


def by_functions(features: Mapping[str, Tensor], target: Tensor) -> dict[str, Score]:
    letters = {role[0].upper(): feature for role, feature in features.items()}
    found = {}
    for name in scores_among(features):
        kind, inside = name[:-1].split("(")
        if kind == "FSS":
            first, second = inside.split(",")
            found[name] = kdx.fss(letters[first], letters[second], permutations=0)
        else:
            first, _, given = inside.partition("|")
            found[name] = kdx.rs(letters[first], target, given=letters[given] if given else None, permutations=0)
    return found


def assert_explained(file: Written, pixels: Tensor, target: Tensor) -> None:
    found = file.run(pixels, target)
    logits, layers = file.eager(pixels)
    assert list(found) == list(file.graph.output_names)
    for role in file.roles:
        assert worst(found[f"logits/{role}"], logits[role]) <= MAPS_AGREE
    for layer, features in layers.items():
        distances = [reference.distances(features[role].double().flatten(1)) for role in file.roles]
        assert found[f"{layer}/distances"].dtype == np.float32
        assert worst(found[f"{layer}/distances"], torch.stack(distances)) <= MAPS_AGREE
        for name, (explained, given) in maps_among(file.roles).items():
            expected = kdx.unicam(features[explained], features[given], target)
            assert worst(found[f"{layer}/{name}/maps"], expected.maps) <= MAPS_AGREE
            assert worst(found[f"{layer}/{name}/weights"], expected.weights) <= MAPS_AGREE
            assert (
                np.abs(found[f"{layer}/{name}/scaled"] - expected.scaled((pixels.shape[2], pixels.shape[3])).numpy()).max() <= FAINT_AGREE
            )
        scores = dict(zip(describe(file.path).scores, found[f"{layer}/scores"].tolist(), strict=True))
        assert scores == pytest.approx(by_definition(features, target), abs=SCORES_AGREE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [5, 7, 16])
def test_an_explainer_file_is_unicam_and_the_scores(trio: Written, n: int, target: str) -> None:
    assert_explained(trio, images(n, (16, 12), seed=n), TARGETS[target](n))


def test_its_scores_are_those_of_the_functions(trio: Written) -> None:
    pixels, labels = images(9, (16, 12), seed=6), torch.arange(9) % 3
    found = trio.run(pixels, torch.eye(3)[labels])
    for layer, features in trio.eager(pixels)[1].items():
        scores = dict(zip(SCORES, found[f"{layer}/scores"].tolist(), strict=True))
        assert scores == pytest.approx({name: score.value for name, score in by_functions(features, labels).items()}, abs=SCORES_AGREE)


@pytest.mark.parametrize("size", [(15, 21), (12, 10), (33, 8)])
def test_images_of_any_size_are_resized_inside_and_maps_to_their_size(trio: Written, size: tuple[int, int]) -> None:
    assert_explained(trio, images(9, size), one_hot(9, 4))


@pytest.mark.parametrize("n", [5, 7, 16])
def test_without_a_teacher_and_of_one_size(pair: Written, n: int) -> None:
    assert pair.graph.output_names[2:] == (
        *(f"layer2/{name}/{what}" for name in ("distilled", "residual") for what in ("maps", "scaled", "weights")),
        "layer2/scores",
        "layer2/distances",
    )
    assert_explained(pair, images(n, seed=n), one_hot(n, 3))


@pytest.mark.parametrize("which", ["trio", "pair"])
def test_four_images_have_scores_and_no_maps(which: str, request: pytest.FixtureRequest) -> None:
    """Beside the given network's geometry four images leave one dimension, in which relevance cannot change."""
    file: Written = request.getfixturevalue(which)
    few, more = (file.run(images(n, FIXED if which == "pair" else (16, 12), seed=4), one_hot(n, 2)) for n in (4, 16))
    _, layers = file.eager(images(4, FIXED if which == "pair" else (16, 12), seed=4))
    for layer, features in layers.items():
        assert dict(zip(describe(file.path).scores, few[f"{layer}/scores"].tolist(), strict=True)) == pytest.approx(
            by_definition(features, one_hot(4, 2)), abs=SCORES_AGREE
        )
        for name in maps_among(file.roles):
            assert np.abs(few[f"{layer}/{name}/maps"]).max() <= MAPS_AGREE * more[f"{layer}/{name}/maps"].max()


def test_what_it_says_of_itself(trio: Written, pair: Written) -> None:
    found = describe(trio.path)
    assert (found.kind, found.layers, found.scores, found.image_size) == ("explainer", ("layer1", "relu"), tuple(SCORES), None)
    assert found.networks["teacher"].layers == ("layer2", "layer1.0.bn2") and found.at is None
    for role, each in trio.networks.items():
        about = found.networks[role]
        assert (about.reference, about.weights, about.parameters) == (each.reference, each.weights_hash, each.parameters)
        assert about.preprocessing == each.preprocessing
    assert found.inputs == {"images": ("batch", 3, "height", "width"), "target": ("batch", "embedding")}
    shapes = {name: shape for name, shape in found.outputs.items() if name.startswith("layer1/")}
    assert shapes["layer1/missed/maps"] == ("batch", 8, 6) and shapes["layer1/missed/weights"] == ("batch", 12)
    assert shapes["layer1/distilled/scaled"] == ("batch", "height", "width")
    assert shapes["layer1/scores"] == (9,) and shapes["layer1/distances"] == (3, "batch", "batch")
    alone = describe(pair.path)
    assert (alone.classes, alone.image_size) == (CLASSES, FIXED)
    assert alone.scores == ("RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)")
    assert alone.outputs["layer2/distilled/scaled"] == ("batch", *FIXED)


def test_an_image_twice_in_a_batch_is_at_no_distance_from_itself(trio: Written) -> None:
    pixels, target = images(8, (16, 12), seed=5), one_hot(8, 2)
    pixels[6] = pixels[2]
    found = trio.run(pixels, target)
    assert all(np.isfinite(values).all() for values in found.values())
    for layer in trio.layers:
        distances = found[f"{layer}/distances"]
        assert (distances[:, 2, 6] == 0).all() and (distances[:, 6, 2] == 0).all()
        assert (np.diagonal(distances, axis1=1, axis2=2) == 0).all()
        assert (distances[:, 2, 7] > 0).all()
    assert_explained(trio, pixels, target)


@pytest.mark.slow
def test_a_map_of_networks_that_differ_by_rounding_is_zero(tmp_path: Path) -> None:
    networks = {role: network(0, 3, 3, Preprocessing(), stages=1) for role in ("student", "base")}
    with torch.no_grad():
        for parameter in networks["base"].module.parameters():
            parameter.copy_(torch.nextafter(parameter, 2 * parameter))
    twins = written(tmp_path, networks, {"layer1": "layer1"}, FIXED, tolerance=math.inf)  # a score of rounding is rounding
    found = twins.run(images(9), one_hot(9, 3))
    for name in ("distilled", "residual"):
        for what in ("maps", "scaled", "weights"):
            assert not found[f"layer1/{name}/{what}"].any()
    assert found["layer1/distances"].any() and np.isfinite(found["layer1/distances"]).all()
    for arguments in ({"file": twins.path}, {**networks, "layers": "layer1", "runtime": "eager"}):
        with Explainer(**arguments) as explainer, pytest.raises(KdxError, match="explain"):
            explainer(images(9), torch.arange(9) % 3)


# ---- without kdx, without PyTorch ----

ALONE = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
feeds = {entry.name: np.load(f"{entry.name}.npy") for entry in session.get_inputs()}
np.savez("found.npz", **{name.replace("/", "|"): value for name, value in zip(names, session.run(None, feeds))})
strangers = {name.split(".")[0] for name in sys.modules} & {"torch", "kdx", "onnx", "onnxscript"}
assert not strangers, strangers
"""


def test_onnx_runtime_alone_makes_the_maps(trio: Written, tmp_path: Path) -> None:
    pixels, labels = images(10, (20, 14), seed=3), torch.arange(10) % 3
    np.save(tmp_path / "images.npy", pixels.numpy())
    np.save(tmp_path / "target.npy", np.eye(3, dtype=np.float32)[labels.numpy()])
    done = subprocess.run([sys.executable, "-c", ALONE, trio.path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as content:
        found = {name.replace("|", "/"): content[name] for name in content.files}
    _, layers = trio.eager(pixels)
    for layer, features in layers.items():
        for name, (explained, given) in maps_among(ROLES).items():
            expected = kdx.unicam(features[explained], features[given], labels)
            assert worst(found[f"{layer}/{name}/maps"], expected.maps) <= MAPS_AGREE


# ---- kdx.Explainer(file=...) ----


def by_pytorch(networks: Mapping[str, Network], **settings: Any) -> Explainer:
    return Explainer(**{**networks, **settings}, runtime="eager")


def both(file: Written, **settings: Any) -> tuple[Explainer, Explainer]:
    return (
        Explainer(file=file.path, permutations=199, **settings),
        by_pytorch(file.networks, layers=file.layers, permutations=199, **settings),
    )


@pytest.mark.parametrize("which", ["trio", "pair"])
def test_a_file_explains_as_its_networks_do(which: str, request: pytest.FixtureRequest) -> None:
    file: Written = request.getfixturevalue(which)
    pixels, labels = images(13, seed=2), torch.arange(13) % 3
    ours, theirs = both(file, seed=4)
    with ours, theirs:
        found, expected = ours(pixels, labels), theirs(pixels, labels)
    assert list(found.layers) == list(expected.layers) == list(file.layers) and found.logits.keys() == expected.logits.keys()
    for role, rows in expected.logits.items():
        assert worst(found.logits[role], rows) <= MAPS_AGREE
    for layer, known in expected.layers.items():
        got = found.layers[layer]
        for name in MAPS:
            if getattr(known, name) is None:
                assert getattr(got, name) is None
                continue
            assert worst(getattr(got, name).maps, getattr(known, name).maps) <= MAPS_AGREE
            assert worst(getattr(got, name).weights, getattr(known, name).weights) <= MAPS_AGREE
            assert getattr(got, name).score == pytest.approx(getattr(known, name).score, abs=SCORES_AGREE)
            assert getattr(got, name).score == pytest.approx(got.scores[MAPS[name].score].value, abs=SCORES_AGREE)
        assert got.scores.keys() == known.scores.keys() and got.contrasts.keys() == known.contrasts.keys()
        for name, score in known.scores.items():
            assert got.scores[name].value == pytest.approx(score.value, abs=SCORES_AGREE)
            assert got.scores[name].interval == pytest.approx(score.interval, abs=1e-3)
            assert got.scores[name].p_value == pytest.approx(score.p_value, abs=1.01 / 200)  # one permutation may tie
        for name, (value, interval) in known.contrasts.items():
            assert got.contrasts[name][0] == pytest.approx(value, abs=SCORES_AGREE)
            assert got.contrasts[name][1] == pytest.approx(interval, abs=1e-3)


def test_a_file_says_what_its_networks_are(trio: Written, pair: Written) -> None:
    for file in (trio, pair):
        ours, theirs = both(file)
        with ours, theirs:
            known = theirs.networks()
            if file is pair:  # the file takes one size, the networks any
                known = {role: replace(record, image_size=FIXED) for role, record in known.items()}
            assert ours.networks() == known
            assert (ours.layers, ours.roles, ours.choice.runtime) == (theirs.layers, theirs.roles, "onnx")


def test_numpy_in_numpy_out_and_some_of_the_layers(trio: Written) -> None:
    pixels, labels = images(6), np.arange(6) % 2
    with Explainer(file=str(trio.path), permutations=9) as whole, Explainer(file=trio.path, layers={"relu": "layer1.0.bn2"}) as part:
        everything, found = whole(pixels.numpy(), labels), part(pixels.numpy(), labels)
    assert list(found.layers) == ["relu"] and part.layers == {"relu": "layer1.0.bn2"}
    maps, same = found.layers["relu"].new, everything.layers["relu"].new
    assert maps is not None and same is not None
    assert isinstance(maps.maps, np.ndarray) and np.array_equal(maps.maps, same.maps)


def test_an_embedding_of_the_labels_is_the_labels(pair: Written) -> None:
    pixels, labels = images(8), torch.tensor([5, 3, 3, 9, 5, 5, 9, 3])
    with Explainer(file=pair.path, permutations=9) as explainer:
        found, expected = explainer(pixels, labels), explainer(pixels, torch.eye(10)[labels])
    assert torch.allclose(found.layers["layer2"].distilled.maps, expected.layers["layer2"].distilled.maps, rtol=1e-5)
    assert found.layers["layer2"].scores == expected.layers["layer2"].scores


def test_the_file_of_an_engine_gets_targets_as_wide_as_it_takes(pair: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(OnnxRuntimeRunner):
        """Its target has seven columns, as an engine's has a number of them."""

        def __init__(self, path: Path, *_: object) -> None:
            super().__init__(path)
            self.inputs = {"images": self.inputs["images"], "target": ("batch", 7)}

    pixels, labels = images(16), torch.arange(16) % 3
    with Explainer(file=pair.path, permutations=9) as explainer:
        expected = explainer(pixels, labels)
    monkeypatch.setattr("kdx.explain.exported.open_file", Narrow)
    with Explainer(file=pair.path, permutations=9) as explainer:
        found = explainer(pixels, labels)
        assert worst(found.layers["layer2"].distilled.maps, expected.layers["layer2"].distilled.maps) <= MAPS_AGREE
        with pytest.raises(KdxError, match="The target has 8 columns, and the engine takes 7"):
            explainer(pixels, torch.arange(16) % 8)


@pytest.fixture(scope="module")
def features_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "net.onnx"
    made = network(0, 2, 3, Preprocessing(), stages=1)
    onnx_file.write(FeatureGraph(made.module, ["layer1"]), path, origin=Origin("a:b", ""), image_size=FIXED)
    return path


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        ({"layers": "layer3"}, "does not hold the layer 'layer3'", "It holds layer1=layer2, relu=layer1.0.bn2"),
        ({"layers": {"layer1": "layer3"}}, "does not hold the layer 'layer1=layer3'", "It holds layer1=layer2"),
        ({"layers": "layer1"}, "does not hold the layer 'layer1'", "It holds layer1=layer2"),
        ({"chunk": 4}, "takes a batch whole", "Leave the chunk out"),
        ({"objective": "uniqueness"}, "not of uniqueness weighted gap", "the networks themselves"),
        ({"weighting": "elementwise"}, "not of relevance weighted elementwise", "the networks themselves"),
        ({"runtime": "eager"}, "cannot run in PyTorch", "--runtime onnx"),
    ],
)
def test_what_a_file_cannot_do_is_an_error(trio: Written, settings: dict[str, Any], said: str, hint: str) -> None:
    with pytest.raises(KdxError) as caught:
        Explainer(file=trio.path, **settings)
    assert said in caught.value.problem and hint in caught.value.hint


def test_files_that_are_no_explainer_are_refused(features_file: Path, trio: Written, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="is a file of features, not an explainer"):
        Explainer(file=features_file)
    with pytest.raises(KdxError, match="is a file of explainer, not of features"):
        Explainer(student=trio.path, base=trio.path, layers="layer2")
    with pytest.raises(KdxError, match="There is no file"):
        Explainer(file=tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="contains its networks; do not give student, base"):
        Explainer(file=trio.path, student=trio.networks["student"], base=trio.networks["base"])


def test_reference_mode_and_batches_that_do_not_fit_are_errors(pair: Written) -> None:
    with Explainer(file=pair.path) as explainer:
        with pytest.raises(KdxError, match="among its batch mates alone"):
            explainer.use_references(images(8), torch.arange(8) % 2)
        with pytest.raises(KdxError, match="at least 4 images"):
            explainer(images(3), torch.arange(3) % 2)
        with pytest.raises(KdxError, match="takes images of 12 x 10"):
            explainer(images(8, (12, 11)), torch.arange(8) % 2)
        with pytest.raises(KdxError, match="one class"):
            explainer(images(8), torch.zeros(8, dtype=torch.int64))
        with pytest.raises(KdxError, match="5 rows of the target"):
            explainer(images(8), torch.arange(5) % 2)
        with pytest.raises(KdxError):
            explainer(torch.full((8, 3, *FIXED), torch.nan), torch.arange(8) % 2)


# ---- kdx explain ----


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(26):
        place = root / CLASSES[number % 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 17, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def finished(pair: Written, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    arguments = [pictures, "--models", pair.path, "--out", out, "--batch", 9, "--permutations", 19, "--seed", 3]
    assert commands.status_of("explain", *arguments) == 0
    return out


def stored(out: Path) -> dict[str, Any]:
    group = zarr.open_group(out / "maps.zarr", mode="r")
    return {
        "scores": (out / "scores.json").read_bytes(),
        "samples": pq.read_table(out / "samples.parquet").to_pydict(),
        **{name: np.asarray(group[f"layer2/{name}"]).tolist() for name in ("distilled", "residual")},
    }


def test_kdx_explain_of_a_file_is_a_run_like_any_other(pair: Written, pictures: Path, finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["images"]["explained"] == 26
    assert manifest["environment"]["runtime"] == "onnx on cpu" and manifest["random_weights"] == []
    configuration = manifest["configuration"]
    assert configuration["layers"] == {"layer2": "layer2"} and configuration["image_size"] == list(FIXED)
    for role, each in pair.networks.items():
        held = configuration["models"][role]
        assert (held["reference"], held["sha256"], held["parameters"]) == (each.reference, each.weights_hash, each.parameters)
        assert held["preprocessing"] == json.loads(json.dumps(asdict(each.preprocessing)))
    assert set(configuration["models"]) == {"student", "base"}
    page = (finished / "report.html").read_text()
    assert "How the student differs from the base" in page and "its teacher" not in page
    dataset = open_data(str(pictures), CLASSES)
    samples = pq.read_table(finished / "samples.parquet").to_pylist()
    group = zarr.open_group(finished / "maps.zarr", mode="r")
    with by_pytorch(pair.networks, layers="layer2", permutations=0) as explainer:
        for number, batch in enumerate(random_batches(dataset.labels, 9, 3)):
            expected = explainer(load_images(dataset, batch, FIXED).pixels, torch.from_numpy(dataset.labels[batch]))
            rows = [row for row in samples if row["batch"] == number]
            assert [row["id"] for row in rows] == [dataset.ids[i] for i in batch]
            assert [row["student_prediction"] for row in rows] == expected.logits["student"].argmax(1).tolist()
            for name in ("distilled", "residual"):
                maps = np.asarray(group[f"layer2/{name}"])[[row["row"] for row in rows]]
                assert worst(maps, getattr(expected.layers["layer2"], name).maps) <= MAPS_AGREE


def test_a_stopped_run_of_a_file_resumes(pair: Written, pictures: Path, finished: Path, tmp_path: Path) -> None:
    options = RunOptions(batch=9, permutations=19, seed=3)
    arguments: Any = (str(pictures), pair.path, tmp_path / "run", (), options)
    lines: list[str] = []

    def stopping(self: store.Store, batch: int, *rest: Any) -> None:
        if batch == 1:
            raise KeyboardInterrupt
        write(self, batch, *rest)

    write = store.Store.write_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "write_batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            explain.run(*arguments, announce=lambda line: None)
    explain.run(*arguments, announce=lines.append)
    assert any("Resuming: 1 of 3" in line for line in lines)
    assert stored(tmp_path / "run") == stored(finished)


@pytest.mark.parametrize(
    ("change", "layers", "said"),
    [
        ({"reference_images": 8}, (), "among its batch mates alone"),
        ({"chunk": 4}, (), "takes a batch whole"),
        ({"objective": "uniqueness"}, (), "not of uniqueness"),
        ({"runtime": "eager"}, (), "cannot run in PyTorch"),
        ({}, ("layer1",), "does not hold the layer 'layer1'"),
    ],
)
def test_what_a_run_of_a_file_cannot_do_is_said_before_anything_is_written(
    pair: Written, pictures: Path, tmp_path: Path, change: dict[str, Any], layers: tuple[str, ...], said: str
) -> None:
    with pytest.raises(KdxError, match=said):
        explain.run(str(pictures), pair.path, tmp_path / "run", layers, replace(RunOptions(batch=9), **change))
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_file_of_features_is_refused(features_file: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="is a file of features, not an explainer"):
        explain.run(str(pictures), features_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- precision, and the files themselves ----


@pytest.fixture(scope="module")
def half(pair: Written, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("half"), pair.networks, pair.layers, FIXED, "fp16")


@pytest.mark.slow
def test_in_float16_the_geometry_is_float32s(half: Written) -> None:
    pixels, target = images(12, seed=8), one_hot(12, 3)
    found = half.run(pixels, target)
    assert all(values.dtype == np.float32 for values in found.values())
    networks = {role: FeatureGraph(each.module.half(), ["layer2"]) for role, each in _copies(half).items()}
    with torch.no_grad():
        features = {role: graph(pixels)[1] for role, graph in networks.items()}
    scores = dict(zip(describe(half.path).scores, found["layer2/scores"].tolist(), strict=True))
    assert scores == pytest.approx(by_definition(features, target), abs=2e-3)  # the networks' own rounding, of 11 bits
    distances = torch.stack([reference.distances(features[role].double().flatten(1)) for role in half.roles])
    assert worst(found["layer2/distances"], distances) <= 2e-3


def _copies(file: Written) -> dict[str, Network]:
    return {role: replace(each, module=copy.deepcopy(each.module)) for role, each in file.networks.items()}


@pytest.mark.slow
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
    found = engine.build(file.path, tmp_path / "x.engine", batch=(4, 8, 8), arch=arch, image_size=size)
    classes = len(CLASSES) if which == "half" else 5
    assert found.kind == "explainer" and found.inputs == {"images": ("batch", 3, *(size or FIXED)), "target": ("batch", classes)}
    assert found.outputs[f"{found.layers[0]}/distilled/scaled"] == ("batch", *(size or FIXED))
    assert found.outputs[f"{found.layers[0]}/distances"] == (len(file.roles), "batch", "batch")
    assert found.file == describe(file.path) and (tmp_path / "x.engine").read_bytes()[:4] == b"vtrt"
