"""Grad-CAM and HiResCAM against hooks and an explicit backward pass."""

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
from kdx.maps.class_maps import ClassMaps
from kdx.models.network import Network
from kdx.models.resnet import resnet
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from kdx.runtimes.tensorrt import TensorRtRunner
from tests import oracle
from tests.hooked import CLASSES, MEAN, SIZE, STD, Blocks, Net, agree, batch, by_hand, cam_of_gradient, exported, hooked

CPU = torch.device("cpu")
METHODS: dict[str, Callable[..., ClassMaps[Any]]] = {"gap": kdx.grad_cam, "elementwise": kdx.hires_cam}


class Tokens(nn.Module):
    """Patches as tokens after a class token. The class token attends to them and predicts."""

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


@pytest.mark.parametrize("weighting", METHODS)
@pytest.mark.parametrize("layer", ["conv1", "relu", "conv2", "conv3"])
@pytest.mark.parametrize("choice", ["predicted", "one", "each"])
def test_maps_equal_those_of_hooks_and_a_backward_pass(weighting: str, layer: str, choice: str) -> None:
    network, images = Net().double().eval(), batch()
    classes = {"predicted": None, "one": 3, "each": torch.arange(8) % CLASSES}[choice]
    tensor = torch.full((8,), 3) if isinstance(classes, int) else classes
    actual, expected = METHODS[weighting](network, images, layer, classes), by_hand(network, images, layer, tensor, weighting)
    agree(actual, expected)
    assert torch.equal(actual.classes, expected.classes)
    torch.testing.assert_close(actual.logits, expected.logits)


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "a difference": lambda logits: logits[:, 3] - 2 * logits[:, 1],
    "a probability": lambda logits: logits.softmax(1)[:, 2],
    "an entropy": lambda logits: -(logits.softmax(1) * logits.log_softmax(1)).sum(1),
}


@pytest.mark.parametrize("weighting", METHODS)
@pytest.mark.parametrize("name", TARGETS)
def test_maps_of_a_target_equal_those_of_a_network_that_ends_in_it(weighting: str, name: str) -> None:
    """The target is appended to the network as a module with one logit, and that logit is explained."""

    class Ending(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            return TARGETS[name](self.network(images))[:, None]

    network, images = Net().double().eval(), batch()
    actual = METHODS[weighting](network, images, "conv2", target=TARGETS[name], chunk=3)
    expected = METHODS[weighting](Ending(network).eval(), images, "network.conv2", 0)
    assert oracle.error(actual.maps, expected.maps) < 1e-9 and oracle.error(actual.weights, expected.weights) < 1e-9
    assert torch.equal(actual.classes, network(images).argmax(1)) and actual.logits.shape == (8, CLASSES)


@pytest.mark.slow
def test_a_target_that_is_a_logit_gives_the_maps_of_the_class_in_every_kind_of_network(tmp_path: Path) -> None:
    network, images = Net().eval(), batch().float()
    path = exported(tmp_path, network, ["conv2"])
    for source in (network, path):
        assert torch.equal(
            kdx.grad_cam(source, images, "conv2", target=lambda logits: logits[:, 3]).maps, kdx.grad_cam(source, images, "conv2", 3).maps
        )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda logits: logits, r"shape \[8, 5\] for logits"),
        (lambda logits: logits.sum(), r"shape \[\] for logits"),
        (lambda logits: 3.0, "a value of type float for logits"),
        (lambda logits: logits.argmax(1).double(), "does not depend on them"),
        (lambda logits: (logits[:, 0] * 0).sqrt(), "no finite derivative"),
    ],
)
def test_targets_that_cannot_be_differentiated(target: Any, message: str) -> None:
    with pytest.raises(KdxError, match=message):
        kdx.grad_cam(Net().double().eval(), batch(), "conv2", target=target)
    with pytest.raises(TypeError, match="not int; give class numbers as classes="):
        kdx.grad_cam(Net().double().eval(), batch(), "conv2", target=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="not both"):
        kdx.hires_cam(Net().double().eval(), batch(), "conv2", 1, target=target)


def test_the_two_methods_differ_where_positions_matter() -> None:
    network, images = Net().double().eval(), batch()
    assert oracle.error(kdx.grad_cam(network, images, "conv2").maps, kdx.hires_cam(network, images, "conv2").maps) > 0.01


@pytest.mark.parametrize("weighting", METHODS)
def test_preprocessing_precedes_the_network(weighting: str) -> None:
    network, images = Net().double().eval(), batch()
    normalized = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    actual = METHODS[weighting](Network("net", network, Preprocessing(None, MEAN, STD)), images, "conv2")
    agree(actual, by_hand(network, normalized, "conv2", None, weighting))


@pytest.mark.parametrize("weighting", METHODS)
def test_tokens_are_a_grid(weighting: str) -> None:
    network, images = Tokens().double().eval(), batch(size=(12, 9))
    logits, tokens = hooked(network, images, "mixed")
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), tokens)
    grid, gradients = (part[:, 1:].transpose(1, 2).reshape(8, 8, 4, 3) for part in (tokens, gradient))
    weights, maps = cam_of_gradient(grid, gradients, weighting)
    agree(METHODS[weighting](network, images, "mixed", 2), ClassMaps(maps, weights, None, None))


def test_a_layer_after_which_only_the_class_token_is_read_is_not_the_default_and_is_refused() -> None:
    network, images = Blocks().eval(), batch(dtype=torch.float32, size=(12, 9))
    assert kdx.models.layers(network, (12, 9)) == ["first"]
    for method in METHODS.values():
        actual = method(network, images)
        agree(actual, method(network, images, "first"), 1e-12)
        with pytest.raises(KdxError, match="No position of layer 'last'"):
            method(network, images, "last", chunk=5)


def test_before_a_mean_and_a_linear_layer_both_are_class_activation_maps() -> None:
    """CAM of Zhou et al. 2016, the classifier's weights times the features; a theorem of both papers."""
    network, images = resnet(4, 1, CLASSES).double().eval(), batch()
    _, feature = hooked(network, images, "layer3")
    terms = torch.einsum("c,nchw->nhw", network.fc.weight[1] / (feature.shape[2] * feature.shape[3]), feature).detach()
    for method in METHODS.values():
        assert oracle.error(method(network, images, "layer3", 1).maps, terms.clamp_min(0)) < oracle.TOLERANCE["float64"]


def test_before_one_linear_layer_hires_cam_adds_up_to_the_logit() -> None:
    """Draelos and Carin's theorem, with no negative term, so that the ReLU removes nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(4 * 11 * 7, CLASSES)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), linear).double()
    with torch.no_grad():
        linear.weight.abs_()
    actual = kdx.hires_cam(network, batch(), "1", 2)
    torch.testing.assert_close(actual.maps.sum((1, 2)), actual.logits[:, 2] - linear.bias[2].detach())


def test_a_vector_is_a_map_of_one_position() -> None:
    network, images = Net().double().eval(), batch()
    actual = kdx.grad_cam(network, images, "fc", 2)
    assert actual.maps.shape == (8, 1, 1) and torch.equal(actual.weights, torch.eye(CLASSES).double()[2].expand(8, CLASSES))
    assert torch.equal(actual.maps[:, 0, 0], actual.logits[:, 2].relu())
    assert torch.equal(actual.maps, kdx.hires_cam(network, images, "fc", 2).maps)


@pytest.mark.parametrize("weighting", METHODS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_chunk_changes_nothing(weighting: str, chunk: int) -> None:
    network, images = Net().double().eval(), batch()
    classes = np.arange(8) % CLASSES
    for choice in (None, 4, classes):
        whole, parts = (METHODS[weighting](network, images, "conv2", choice, chunk=size) for size in (None, chunk))
        agree(parts, whole, 1e-12)
        assert torch.equal(parts.classes, whole.classes) and torch.allclose(parts.logits, whole.logits)
    halves = [METHODS[weighting](network, images[half], "conv2", classes[half]) for half in (slice(0, 3), slice(3, 8))]
    assert oracle.error(torch.cat([half.maps for half in halves]), whole.maps) < 1e-12


@pytest.mark.parametrize("kind", [np.int64, np.uint8, ">i4"])
def test_numpy_in_is_numpy_out(kind: Any) -> None:
    network, images = Net().double().eval(), batch()
    classes = np.arange(8) % CLASSES
    actual = kdx.grad_cam(network, images.numpy(), "conv2", classes.astype(kind))
    assert all(isinstance(value, np.ndarray) for value in (actual.maps, actual.weights, actual.classes, actual.logits))
    assert np.array_equal(actual.maps, kdx.grad_cam(network, images, "conv2", torch.from_numpy(classes)).maps.numpy())
    scaled = actual.scaled((31, 17))
    assert isinstance(scaled, np.ndarray) and scaled.shape == (8, 31, 17) and scaled.min() >= 0 and scaled.max() <= 1


def test_strided_and_half_precision_images() -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    agree(kdx.grad_cam(network, strided, "conv2"), kdx.grad_cam(network, images, "conv2"), 1e-5)
    rounded = images.half()
    agree(kdx.grad_cam(network, rounded, "conv2"), kdx.grad_cam(network, rounded.float(), "conv2"), 1e-12)


@pytest.mark.slow
def test_a_file_gives_what_pytorch_gives(gradients_file: Path) -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    path = gradients_file
    normalized = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    for weighting, method in METHODS.items():
        for choice in (None, torch.arange(8) % CLASSES):
            expected = by_hand(network, normalized, "conv2", choice, weighting)
            for source in (path, str(path)):
                actual = method(source, images, "conv2", choice, chunk=3)
                agree(actual, expected, oracle.TOLERANCE["float32"])
                assert torch.equal(actual.classes, expected.classes)
        with OnnxRuntimeRunner(path) as runner:
            expected = by_hand(network, normalized, "conv1", torch.zeros(8).long(), weighting)
            agree(method(runner, images, "conv1", 0), expected, oracle.TOLERANCE["float32"])
            method(runner, images, "conv2")  # and is still open
            with pytest.raises(KdxError, match="no class 5: the network has 5"):
                method(runner, images, "conv2", 5)


class Engine(TensorRtRunner):
    """An engine for at most three images, simulated by PyTorch."""

    def __init__(self, graph: GradientGraph) -> None:
        self.device, self.kind, self.layers = CPU, graph.kind, graph.layers
        self.inputs = {"images": ("batch", 3, *SIZE), "cotangent": ("batch", CLASSES)}
        self.outputs = {"logits": ("batch", CLASSES)}
        self.engine = cast("EngineDescription", SimpleNamespace(batch=(1, 2, 3)))
        self.description = cast("Any", SimpleNamespace(at=graph.at, precision="fp32", networks={}, image_size=None))
        self.inside = EagerRunner(graph, CPU)
        self.taken: list[int] = []

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.taken.append(len(feeds["images"]))
        return self.inside.run(feeds)


def test_an_engine_gets_at_most_the_batch_it_was_built_for() -> None:
    network, images = Net().double().eval(), batch()
    whole = kdx.grad_cam(network, images, "conv2")
    for chunk, taken in ((None, [3, 3, 2]), (100, [3, 3, 2]), (2, [2, 2, 2, 2])):
        runner = Engine(GradientGraph(network, ["conv2"]))
        agree(kdx.grad_cam(runner, images, chunk=chunk), whole, 1e-12)
        assert runner.taken == [*taken, *taken]  # what is predicted, then its gradient
        runner.taken.clear()
        kdx.grad_cam(runner, images, classes=1, chunk=chunk)
        assert runner.taken == taken


def test_an_open_runner_stays_open_and_a_network_is_not_changed() -> None:
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


def test_the_default_layer_is_the_last_stage() -> None:
    actual = kdx.grad_cam("kdx:resnet,width=4,depth=1,classes=5", batch(dtype=torch.float32))
    assert actual.weights.shape == (8, 16) and actual.maps.shape == (8, 8, 8)
    assert kdx.grad_cam(Net(), batch(dtype=torch.float32)).weights.shape == (8, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    options = {"images": batch(), "layer": "conv2"} | arguments
    for method in METHODS.values():
        with pytest.raises(KdxError, match=message):
            method(Net().double(), **options)


def test_misused_options_are_value_errors() -> None:
    network, images = Net().double(), batch()
    with pytest.raises(ValueError, match="chunk"):
        kdx.grad_cam(network, images, "conv2", chunk=0)
    with EagerRunner(GradientGraph(network, ["conv2"]), CPU) as runner, pytest.raises(ValueError, match="device"):
        kdx.grad_cam(runner, images, device="cpu")


@pytest.mark.slow
def test_a_file_of_features_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.onnx"
    onnx_file.write(FeatureGraph(Net().eval(), ["conv2"]), path, origin=Origin("net", "0" * 64), image_size=SIZE)
    with pytest.raises(KdxError, match=r"features\.onnx contains features, not gradients\.\n.*--kind gradients"):
        kdx.grad_cam(path, batch(dtype=torch.float32))


def test_a_graph_without_the_right_gradients_is_refused(tmp_path: Path) -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    with EagerRunner(FeatureGraph(network, ["conv2"]), CPU) as runner, pytest.raises(KdxError, match="--kind gradients"):
        kdx.grad_cam(runner, images)
    with EagerRunner(GradientGraph(network, ["conv1", "conv2"]), CPU) as runner:
        with pytest.raises(KdxError, match=r"several layers\.\nName one of conv1, conv2"):
            kdx.grad_cam(runner, images)
        with pytest.raises(KdxError, match="does not contain the layer 'conv3'"):
            kdx.grad_cam(runner, images, "conv3")
    with EagerRunner(GradientGraph(network, ["conv1"], at="conv2"), CPU) as runner, pytest.raises(KdxError, match="not of the logits"):
        kdx.grad_cam(runner, images)
    with pytest.raises(KdxError, match="no file"):
        kdx.grad_cam(tmp_path / "absent.onnx", images)


def test_without_a_feature_map_there_is_no_default_layer() -> None:
    with pytest.raises(KdxError, match="no layer whose output is a feature map that the logits depend on"):
        kdx.grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(3 * 13 * 9, 4)), batch(dtype=torch.float32))
    with pytest.raises(KdxError, match=r"does not run .*\nName a layer"):
        kdx.grad_cam(nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten()), batch(dtype=torch.float32))


def test_both_methods_take_the_same_arguments() -> None:
    assert inspect.signature(kdx.grad_cam) == inspect.signature(kdx.hires_cam)
