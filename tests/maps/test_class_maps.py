"""Grad-CAM, HiResCAM and UniCAM of an earlier layer against hooks and a backward pass written out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx import KdxError
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.engine import EngineDescription
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.kernels import reference
from kdx.maps.class_maps import ClassMaps
from kdx.models.network import Network
from kdx.models.resnet import resnet
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from kdx.runtimes.tensorrt import TensorRtRunner
from tests import oracle
from tests.hooked import CLASSES, SIZE, Blocks, Net, batch, by_hand, cam_of_gradient, exported, hooked

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
METHODS: dict[str, Callable[..., ClassMaps[Any]]] = {"gap": kdx.grad_cam, "elementwise": kdx.hires_cam}


class Tokens(nn.Module):
    """Patches as tokens behind a class token, which attends to them and predicts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 3, 3)
        self.mixed = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = self.mixed(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
        logits: Tensor = self.fc((tokens + self.attention(tokens, tokens, tokens)[0])[:, 0])
        return logits


def agree(found: Any, expected: Any, tolerance: float = oracle.TOLERANCE["float64"]) -> None:
    for name in ("maps", "weights"):
        assert float(np.abs(np.asarray(getattr(expected, name))).max()) > 0
        assert oracle.error(getattr(found, name), getattr(expected, name)) < tolerance, name


# ---- a class's maps ----


@pytest.mark.parametrize("weighting", METHODS)
@pytest.mark.parametrize("layer", ["conv1", "relu", "conv2", "conv3"])
@pytest.mark.parametrize("choice", ["predicted", "one", "each"])
def test_maps_are_those_of_hooks_and_a_backward_pass(weighting: str, layer: str, choice: str) -> None:
    network, images = Net().double().eval(), batch()
    classes = {"predicted": None, "one": 3, "each": torch.arange(8) % CLASSES}[choice]
    tensor = torch.full((8,), 3) if isinstance(classes, int) else classes
    found, expected = METHODS[weighting](network, images, layer, classes), by_hand(network, images, layer, tensor, weighting)
    agree(found, expected)
    assert torch.equal(found.classes, expected.classes)
    torch.testing.assert_close(found.logits, expected.logits)


def test_the_two_methods_differ_where_positions_matter() -> None:
    network, images = Net().double().eval(), batch()
    assert oracle.error(kdx.grad_cam(network, images, "conv2").maps, kdx.hires_cam(network, images, "conv2").maps) > 0.01


@pytest.mark.parametrize("weighting", METHODS)
def test_preprocessing_stands_before_the_network(weighting: str) -> None:
    network, images = Net().double().eval(), batch()
    normalized = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    found = METHODS[weighting](Network("net", network, Preprocessing(None, MEAN, STD)), images, "conv2")
    agree(found, by_hand(network, normalized, "conv2", None, weighting))


@pytest.mark.parametrize("weighting", METHODS)
def test_tokens_are_a_grid(weighting: str) -> None:
    network, images = Tokens().double().eval(), batch(size=(12, 9))
    logits, tokens = hooked(network, images, "mixed")
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), tokens)
    grid, gradients = (part[:, 1:].transpose(1, 2).reshape(8, 8, 4, 3) for part in (tokens, gradient))
    weights, maps = cam_of_gradient(grid, gradients, weighting)
    agree(METHODS[weighting](network, images, "mixed", 2), ClassMaps(maps, weights, None, None))


def test_a_layer_behind_which_only_the_class_token_is_read_is_no_default_and_refused() -> None:
    network, images = Blocks().eval(), batch(dtype=torch.float32, size=(12, 9))
    assert kdx.models.layers(network, (12, 9))[-2:] == ["first", "last"]
    for method in METHODS.values():
        found = method(network, images)
        agree(found, method(network, images, "first"), 1e-12)
        with pytest.raises(KdxError, match="No position of layer 'last'"):
            method(network, images, "last", chunk=5)


def test_behind_a_mean_and_a_linear_layer_both_are_class_activation_maps() -> None:
    """CAM of Zhou et al. 2016: the classifier's weights on the features; theorem of both papers."""
    network, images = resnet(4, 1, CLASSES).double().eval(), batch()
    _, feature = hooked(network, images, "layer3")
    terms = torch.einsum("c,nchw->nhw", network.fc.weight[1] / (feature.shape[2] * feature.shape[3]), feature).detach()
    for method in METHODS.values():
        assert oracle.error(method(network, images, "layer3", 1).maps, terms.clamp_min(0)) < oracle.TOLERANCE["float64"]


def test_before_one_linear_layer_hires_cam_adds_up_to_the_logit() -> None:
    """Draelos and Carin's theorem, where no term is negative, so that the ReLU takes nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(4 * 11 * 7, CLASSES)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), linear).double()
    with torch.no_grad():
        linear.weight.abs_()
    found = kdx.hires_cam(network, batch(), "1", 2)
    torch.testing.assert_close(found.maps.sum((1, 2)), found.logits[:, 2] - linear.bias[2].detach())


def test_a_vector_is_a_map_of_one_position() -> None:
    network, images = Net().double().eval(), batch()
    found = kdx.grad_cam(network, images, "fc", 2)
    assert found.maps.shape == (8, 1, 1) and torch.equal(found.weights, torch.eye(CLASSES).double()[2].expand(8, CLASSES))
    assert torch.equal(found.maps[:, 0, 0], found.logits[:, 2].relu())
    assert torch.equal(found.maps, kdx.hires_cam(network, images, "fc", 2).maps)


@pytest.mark.parametrize("weighting", METHODS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_chunk_changes_nothing(weighting: str, chunk: int) -> None:
    network, images = Net().double().eval(), batch()
    classes = np.arange(8) % CLASSES
    for asked in (None, 4, classes):
        whole, parts = (METHODS[weighting](network, images, "conv2", asked, chunk=size) for size in (None, chunk))
        agree(parts, whole, 1e-12)
        assert torch.equal(parts.classes, whole.classes) and torch.allclose(parts.logits, whole.logits)
    halves = [METHODS[weighting](network, images[half], "conv2", classes[half]) for half in (slice(0, 3), slice(3, 8))]
    assert oracle.error(torch.cat([half.maps for half in halves]), whole.maps) < 1e-12


@pytest.mark.parametrize("kind", [np.int64, np.uint8, ">i4"])
def test_numpy_in_is_numpy_out(kind: Any) -> None:
    network, images = Net().double().eval(), batch()
    classes = np.arange(8) % CLASSES
    found = kdx.grad_cam(network, images.numpy(), "conv2", classes.astype(kind))
    assert all(isinstance(value, np.ndarray) for value in (found.maps, found.weights, found.classes, found.logits))
    assert np.array_equal(found.maps, kdx.grad_cam(network, images, "conv2", torch.from_numpy(classes)).maps.numpy())
    scaled = found.scaled((31, 17))
    assert isinstance(scaled, np.ndarray) and scaled.shape == (8, 31, 17) and scaled.min() >= 0 and scaled.max() <= 1


def test_strided_and_half_precision_images() -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    agree(kdx.grad_cam(network, strided, "conv2"), kdx.grad_cam(network, images, "conv2"), 1e-5)
    rounded = images.half()
    agree(kdx.grad_cam(network, rounded, "conv2"), kdx.grad_cam(network, rounded.float(), "conv2"), 1e-12)


def test_a_file_gives_what_pytorch_gives(tmp_path: Path) -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    path = exported(tmp_path, network, ["conv1", "conv2"], preprocessing=Preprocessing(None, MEAN, STD))
    normalized = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    for weighting, method in METHODS.items():
        for asked in (None, torch.arange(8) % CLASSES):
            expected = by_hand(network, normalized, "conv2", asked, weighting)
            for given in (path, str(path)):
                found = method(given, images, "conv2", asked, chunk=3)
                agree(found, expected, oracle.TOLERANCE["float32"])
                assert torch.equal(found.classes, expected.classes)
        with OnnxRuntimeRunner(path) as runner:
            expected = by_hand(network, normalized, "conv1", torch.zeros(8).long(), weighting)
            agree(method(runner, images, "conv1", 0), expected, oracle.TOLERANCE["float32"])
            method(runner, images, "conv2")  # and is still open
            with pytest.raises(KdxError, match="no class 5: the network has 5"):
                method(runner, images, "conv2", 5)


class Engine(TensorRtRunner):
    """What is asked of an engine of at most three images, run by PyTorch."""

    def __init__(self, graph: GradientGraph) -> None:
        self.device, self.kind, self.layers = CPU, graph.kind, graph.layers
        self.inputs = {"images": ("batch", 3, *SIZE), "cotangent": ("batch", CLASSES)}
        self.outputs = {"logits": ("batch", CLASSES)}
        self.engine = cast("EngineDescription", SimpleNamespace(batch=(1, 2, 3)))
        self.description = cast("Any", SimpleNamespace(at=graph.at))
        self.inside = EagerRunner(graph, CPU)
        self.taken: list[int] = []

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.taken.append(len(feeds["images"]))
        return self.inside.run(feeds)


def test_an_engine_takes_no_more_than_it_is_built_for() -> None:
    network, images = Net().double().eval(), batch()
    whole = kdx.grad_cam(network, images, "conv2")
    for chunk, taken in ((None, [3, 3, 2]), (100, [3, 3, 2]), (2, [2, 2, 2, 2])):
        runner = Engine(GradientGraph(network, ["conv2"]))
        agree(kdx.grad_cam(runner, images, chunk=chunk), whole, 1e-12)
        assert runner.taken == [*taken, *taken]  # what is predicted, then its gradient
        runner.taken.clear()
        kdx.grad_cam(runner, images, classes=1, chunk=chunk)
        assert runner.taken == taken


def test_an_open_runner_stays_open_and_a_network_as_it_was() -> None:
    network, images = Net().double().train(), batch()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kdx.grad_cam(network, images, "conv2")
    assert network.training and all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    with EagerRunner(GradientGraph(network, ["conv2"]), CPU) as runner:
        first, second = (kdx.grad_cam(runner, images) for _ in range(2))
    assert torch.equal(first.maps, second.maps)
    agree(first, by_hand(network.eval(), images, "conv2", None, "gap"))
    with pytest.raises(ValueError, match="closed"):
        kdx.grad_cam(runner, images)


def test_a_reference_names_a_network_whose_last_stage_is_the_default() -> None:
    found = kdx.grad_cam("kdx:resnet,width=4,depth=1,classes=5", batch(dtype=torch.float32))
    assert found.weights.shape == (8, 16) and found.maps.shape == (8, 8, 8)
    assert kdx.grad_cam(Net(), batch(dtype=torch.float32)).weights.shape == (8, 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"images": batch(0)}, "at least one image"),
        ({"images": batch()[0]}, "images have shape"),
        ({"images": batch()[:, :2]}, "images have shape"),
        ({"images": batch().long()}, "floating-point"),
        ({"layer": "conv4"}, "no layer 'conv4'.*\n.*conv3"),
        ({"classes": 5}, "no class 5: the network has 5"),
        ({"classes": -1}, "no class -1"),
        ({"classes": torch.tensor([0, 1, 2, 3, 4, 0, 1, 7])}, "no class 7"),
        ({"classes": torch.arange(7)}, "7 rows of classes and 8 of images"),
        ({"classes": torch.rand(8)}, "classes have shape"),
        ({"classes": torch.eye(8).long()}, "classes have shape"),
        ({"images": batch().index_fill(0, torch.tensor([2, 5]), torch.nan), "chunk": 3}, r"rows 2\."),
        ({"images": batch().index_fill(0, torch.tensor([5, 7]), torch.inf), "chunk": 4}, r"rows 5, 7\."),
    ],
)
def test_bad_input_says_what_is_wrong(arguments: dict[str, Any], said: str) -> None:
    given = {"images": batch(), "layer": "conv2"} | arguments
    for method in METHODS.values():
        with pytest.raises(KdxError, match=said):
            method(Net().double(), **given)


def test_misused_options_are_value_errors() -> None:
    network, images = Net().double(), batch()
    with pytest.raises(ValueError, match="chunk"):
        kdx.grad_cam(network, images, "conv2", chunk=0)
    with EagerRunner(GradientGraph(network, ["conv2"]), CPU) as runner, pytest.raises(ValueError, match="device"):
        kdx.grad_cam(runner, images, device="cpu")


def test_a_graph_without_the_right_gradients_is_refused(tmp_path: Path) -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    path = tmp_path / "features.onnx"
    onnx_file.write(FeatureGraph(network, ["conv2"]), path, origin=Origin("net", "0" * 64), image_size=SIZE)
    with pytest.raises(KdxError, match=r"features\.onnx contains features, not gradients\.\n.*--kind gradients"):
        kdx.grad_cam(path, images)
    with EagerRunner(FeatureGraph(network, ["conv2"]), CPU) as runner, pytest.raises(KdxError, match="--kind gradients"):
        kdx.grad_cam(runner, images)
    with EagerRunner(GradientGraph(network, ["conv1", "conv2"]), CPU) as runner:
        with pytest.raises(KdxError, match=r"several layers\.\nName one of conv1, conv2"):
            kdx.grad_cam(runner, images)
        with pytest.raises(KdxError, match="does not hold the layer 'conv3'"):
            kdx.grad_cam(runner, images, "conv3")
    with EagerRunner(GradientGraph(network, ["conv1"], at="conv2"), CPU) as runner, pytest.raises(KdxError, match="not of the logits"):
        kdx.grad_cam(runner, images)
    with pytest.raises(KdxError, match="no file"):
        kdx.grad_cam(tmp_path / "absent.onnx", images)


def test_no_feature_map_is_no_default() -> None:
    with pytest.raises(KdxError, match="no layer whose output is a feature map that the logits depend on"):
        kdx.grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(3 * 13 * 9, 4)), batch(dtype=torch.float32))
    with pytest.raises(KdxError, match=r"does not run .*\nName a layer"):
        kdx.grad_cam(nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten()), batch(dtype=torch.float32))


# ---- UniCAM of an earlier layer ----

LABELS = torch.arange(13) % 3


def teacher_features(n: int = 13) -> Tensor:
    with torch.no_grad():
        return hooked(Net(1).double().eval(), batch(n), "conv2")[1]


def objective(x: Tensor, y: Tensor, labels: Tensor, name: str, pooled: bool) -> Tensor:
    """UniCAM's score from features, by the float64 definitions, for autograd."""
    x, y = (part.mean((2, 3)) if pooled else part.flatten(1) for part in (x, y))
    a, b = (reference.u_centered(reference.distances(part)) for part in (x, y))
    r = reference.residual(a, b)
    if name == "uniqueness":
        return reference.uniqueness(r)
    return reference.correlation(r, reference.u_centered(reference.distances(nn.functional.one_hot(labels).double())))


def straight(
    network: nn.Module, images: Tensor, layer: str, at: str, name: str, weighting: str, pooled: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(score, weights, maps, the later layer's features) by autograd from the score back to the earlier layer."""
    _, earlier, later = hooked(network, images, layer, at)
    score = objective(later, teacher_features(len(images)), LABELS[: len(images)], name, pooled)
    (gradient,) = torch.autograd.grad(score, earlier)
    return score.detach(), *cam_of_gradient(earlier, gradient, weighting), later.detach()


@pytest.mark.parametrize("name", ["relevance", "uniqueness"])
@pytest.mark.parametrize("weighting", METHODS)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_an_earlier_layers_maps_by_autograd_straight_through(name: Any, weighting: Any, pooled: bool, layer: str) -> None:
    network, images = Net().double().eval(), batch(13)
    score, weights, maps, later = straight(network, images, layer, "conv3", name, weighting, pooled)
    options = {"objective": name, "weighting": weighting, "pooled": pooled}
    arguments = (layer, later, teacher_features(), LABELS)
    found = kdx.unicam_before(network, images, *arguments, at="conv3", **options)
    assert oracle.error(found.weights, weights) < oracle.TOLERANCE["float64"]
    assert oracle.error(found.maps, maps) < oracle.TOLERANCE["float64"]
    assert found.score == pytest.approx(float(score), rel=1e-9)
    with EagerRunner(GradientGraph(network, [layer], at="conv3"), CPU) as runner:
        parts = kdx.unicam_before(runner, images, *arguments, **options, chunk=4)
    agree(parts, found, 1e-12)


def test_logits_are_a_feature_layer_too() -> None:
    network, images = Net().double().eval(), batch(13)
    _, weights, maps, later = straight(network, images, "conv3", "pool", "relevance", "gap")
    found = kdx.unicam_before(network, images, "conv3", later, teacher_features(), LABELS, at="pool")
    agree(found, kdx.Maps(maps, weights, 0.0))
    logits = network(images)
    vectors = kdx.unicam_before(network, images.numpy(), "conv3", logits.detach(), teacher_features(), LABELS, at="fc")
    assert isinstance(vectors.maps, np.ndarray) and vectors.maps.shape == maps.shape


@pytest.mark.parametrize("weighting", METHODS)
def test_an_earlier_layers_maps_among_references(weighting: Any) -> None:
    """Each query is the last image of a batch with the references, and the gradient is its own alone."""
    network, images = Net().double().eval(), batch(13)
    given, known = teacher_features(), 9
    _, _, _, later = straight(network, images, "conv1", "conv3", "relevance", weighting)
    among = kdx.ReferenceSet(later[:known], given[:known], LABELS[:known])
    queries = slice(known, None)
    found = kdx.unicam_before(
        network, images[queries], "conv1", later[queries], given[queries], LABELS[queries], weighting=weighting, at="conv3", reference=among
    )
    for query in range(4):
        rows = [*range(known), known + query]
        plain = kdx.unicam_before(network, images[rows], "conv1", later[rows], given[rows], LABELS[rows], weighting=weighting, at="conv3")
        assert oracle.error(found.maps[query], plain.maps[-1]) < oracle.TOLERANCE["float64"]
        assert oracle.error(found.weights[query], plain.weights[-1]) < oracle.TOLERANCE["float64"]


def test_an_earlier_layers_maps_from_a_file(tmp_path: Path) -> None:
    network, images = Net().double().eval(), batch(13)
    _, weights, maps, later = straight(network, images, "conv1", "conv3", "relevance", "gap")
    path = exported(tmp_path, Net().eval(), ["conv1"], at="conv3")
    found = kdx.unicam_before(path, images, "conv1", later, teacher_features(), LABELS)
    agree(found, kdx.Maps(maps, weights, 0.0), oracle.TOLERANCE["float32"])
    with pytest.raises(KdxError, match="not of the logits"):
        kdx.grad_cam(path, images)
    with pytest.raises(ValueError, match="cotangent"):
        kdx.unicam_before(path, images, "conv1", later, teacher_features(), LABELS, at="conv3")


def test_small_gradients_outlast_half_precision() -> None:
    """A score that is tiny beside its features has gradients under what float16 holds."""
    network, images = Net().double().eval(), batch(13)
    _, weights, maps, later = straight(network, images, "conv1", "conv3", "relevance", "gap")
    small = 1e-9  # of the same score and of its gradients
    found = kdx.unicam_before(Net().half(), images, "conv1", later, teacher_features(), LABELS, lambda r: small * scored(r), at="conv3")
    assert oracle.error(found.maps / small, maps) < oracle.TOLERANCE["float16"]
    assert oracle.error(found.weights / small, weights) < oracle.TOLERANCE["float16"]


def scored(r: Tensor) -> Tensor:
    return reference.correlation(r, reference.u_centered(reference.distances(nn.functional.one_hot(LABELS).double())))


def test_four_images_have_no_relevance_to_pull_back() -> None:
    network, images = Net().double().eval(), batch(4)
    _, feature = hooked(network, images, "conv3")
    found = kdx.unicam_before(network, images, "conv1", feature, teacher_features(4), torch.tensor([0, 1, 0, 1]), at="conv3")
    assert found.maps.shape == (4, *SIZE) and found.maps.max() == 0 and found.weights.abs().max() == 0


def test_features_that_do_not_belong_to_the_graph_are_refused() -> None:
    network, images = Net().double().eval(), batch(13)
    _, feature = hooked(network, images, "conv3")
    given = teacher_features()
    with pytest.raises(KdxError, match=r"cotangent has shape .*, and conv2"):
        kdx.unicam_before(network, images, "conv1", feature, given, LABELS, at="conv2")
    with pytest.raises(KdxError, match="12 rows of explained features and 13 of images"):
        kdx.unicam_before(network, images, "conv1", feature[:12], given, LABELS, at="conv3")
    with pytest.raises(KdxError, match="one class"):
        kdx.unicam_before(network, images, "conv1", feature, given, torch.zeros(13).long(), at="conv3")
    with pytest.raises(KdxError, match="does not depend on layer 'conv3'"):
        kdx.unicam_before(network, images, "conv3", given, feature, LABELS, at="conv2")
    with pytest.raises(KdxError, match="those of the logits"):
        kdx.unicam_before(network, images, "conv1", feature, given, LABELS)
    with pytest.raises(ValueError, match="weighting"):
        kdx.unicam_before(network, images, "conv1", feature, given, LABELS, weighting="hires", at="conv3")  # type: ignore[arg-type]


def test_both_methods_take_the_same_arguments() -> None:
    assert inspect.signature(kdx.grad_cam) == inspect.signature(kdx.hires_cam)
