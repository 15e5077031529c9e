"""Traced programs against the eager graphs at other sizes than those of the trace."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kdx.export import trace
from kdx.export.graphs import GradientGraph, Preprocessing
from kdx.models.resnet import resnet
from tests.export.trace.programs import BATCH, Behind, agree, in_pytorch, random_inputs, traced


def operators(program: ExportedProgram) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


class Transformer(nn.Module):
    """A class token and 3 x 2 patches; blocks of layer normalisation, attention and a multilayer perceptron."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(blocks)))
        self.fc = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.blocks(torch.cat([self.token.expand(images.shape[0], -1, -1), patches], 1))[:, 0])
        return logits


@pytest.mark.slow
def test_tokens_lose_their_class_token_and_operators_before_the_layer_stay_whole() -> None:
    """The one block before the layer's end still has its attention and its normalisations as single operators."""
    graph = GradientGraph(Transformer().eval(), ["blocks.0"])
    counts = operators(in_pytorch(graph, size=(12, 8)))
    assert counts["aten.scaled_dot_product_attention.default"] == 1
    assert counts["aten.layer_norm.default"] == 2
    assert graph(*random_inputs(graph, 3, (12, 8)))[2].shape == (3, 8, 3, 2)


@pytest.mark.parametrize("layer", [pytest.param("layer1", marks=pytest.mark.slow), "layer2"])
def test_weights_get_no_gradient_and_nothing_before_the_layer_is_differentiated(layer: str) -> None:
    """A convolution behind the layer occurs twice, forward and for its input's gradient; one before the layer occurs once."""
    network = resnet(4, 1, 4).eval()
    convolutions: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, _output, name=name: convolutions.append(name))
    network(torch.rand(1, 3, 12, 10))
    for module in network.modules():
        module._forward_hooks.clear()
    behind = sum(name.startswith("layer") and name.split(".")[0] > layer for name in convolutions)
    counts = operators(in_pytorch(GradientGraph(network, [layer])))
    assert sum(count for name, count in counts.items() if "conv" in name) == len(convolutions) + behind


class Branches(nn.Module):
    """A stem with two branches side by side: one has two parts, the other returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.left = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
        self.right = Pair()
        self.fc = nn.Linear(10, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        one, two = self.right(features)
        logits: Tensor = self.fc(torch.cat([self.left(features).mean((2, 3)) * one.mean((2, 3)), two.amax((2, 3))], 1))
        return logits


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 6, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(features), self.two(features).sigmoid()


@pytest.mark.parametrize(
    "layers",
    [
        ["left", "right[1]", "left.0"],
        pytest.param(["left.0", "left.2", "left"], marks=pytest.mark.slow),
        pytest.param(["right[1]", "right[0]", "right.one"], marks=pytest.mark.slow),
        ["stem", "left.1", "right.two", "right[1]", "left"],
    ],
)
def test_several_layers_in_any_order_nested_and_side_by_side(layers: list[str]) -> None:
    in_pytorch(GradientGraph(Branches().eval(), layers))


class Sized(NamedTuple):
    tokens: Tensor
    size: tuple[int, int]
    mask: Tensor | None


class Stage(nn.Module):
    """Tokens with the size of their grid, as a tuple, a list or a named tuple."""

    def __init__(self, kind: Callable[[Tensor, tuple[int, int]], Any], stride: int) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(6, 6, stride, stride)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Any:
        grid = self.conv(tokens.transpose(1, 2).unflatten(2, size)).tanh()
        return self.kind(grid.flatten(2).transpose(1, 2), (grid.shape[2], grid.shape[3]))


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.pair = Stage(lambda tokens, size: (tokens, size), 2)
        self.items = Stage(lambda tokens, size: [torch.tensor(7), list(size), tokens], 1)
        self.named = Stage(lambda tokens, size: Sized(tokens, size, None), 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        tokens, size = self.pair(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))
        _, size, tokens = self.items(tokens, tuple(size))
        logits: Tensor = self.fc(self.named(tokens, tuple(size)).tokens.square().mean(1))
        return logits


def test_the_only_feature_of_several_outputs_needs_no_index() -> None:
    network = Stages().eval()
    graph = GradientGraph(network, ["pair", "items", "named"])
    in_pytorch(graph, size=(12, 8))
    inputs = random_inputs(graph, 3, (12, 8))
    for ours, indexed in zip(graph(*inputs), GradientGraph(network, ["pair[0]", "items[2]", "named[0]"])(*inputs), strict=True):
        assert torch.equal(ours, indexed)


@pytest.mark.slow
def test_layers_and_their_parts_in_a_residual_network_with_the_cotangent_at_a_layer() -> None:
    network = resnet(4, (1, 2, 1), 4).eval()
    in_pytorch(GradientGraph(network, ["layer2.1", "layer1", "layer2"], at="layer3"))
    in_pytorch(GradientGraph(network, ["layer1.0"], Preprocessing(None, (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)), at="layer1"))


def test_in_place_operators_do_not_change_features_and_gradients() -> None:
    def rest(x: Tensor) -> Tensor:
        y = x.mul_(2).add_(x.mean((2, 3), keepdim=True))
        y[:, 1:3] *= 3
        y += y.flip(3)
        y[:, 7].mul_(0.5)
        y[:, 5] = y[:, 6].sub(0.1).tanh_()
        return F.leaky_relu_(y.sub_(0.3))

    in_pytorch(GradientGraph(Behind(rest).eval(), ["layer"]))


class Twice(nn.Module):
    """One module called twice, with another one between the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.shared = nn.Conv2d(5, 5, 3, padding=1)
        self.between = nn.Conv2d(5, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.between(self.shared(self.stem(images)).relu()).tanh()
        logits: Tensor = self.fc((features + self.shared(features).relu()).mean((2, 3)))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("layers", [["shared"], ["shared", "between"], ["stem", "shared"]])
def test_the_gradient_of_a_module_called_twice_is_that_of_its_last_call(layers: list[str]) -> None:
    in_pytorch(GradientGraph(Twice().eval(), layers))


class Position(nn.Module):
    """A block of its own weights and of a position encoding that other blocks contain too."""

    def __init__(self, encoding: nn.Module) -> None:
        super().__init__()
        self.encoding = encoding
        self.mix = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(self.encoding(x)))


class Sharing(nn.Module):
    """One module registered at four paths, and one parameter at two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.encoding = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6))
        self.blocks = nn.Sequential(*(Position(self.encoding) for _ in range(3)))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.stem(images)).mean((2, 3))
        logits: Tensor = self.fc(self.second(self.first(features).relu()))
        return logits


def test_modules_and_parameters_with_several_names() -> None:
    """The gradient is autograd's on the network itself, and the network keeps its parameters."""
    network = Sharing().eval()
    graph = GradientGraph(network, ["stem", "blocks.1"])
    images, cotangent = random_inputs(graph, 3)
    parameters = {name: id(parameter) for name, parameter in network.named_parameters(remove_duplicate=False)}
    results = dict(zip(graph.output_names, graph(images, cotangent), strict=True))
    assert {name: id(parameter) for name, parameter in network.named_parameters(remove_duplicate=False)} == parameters
    stem = network.stem(images).detach().requires_grad_()
    logits = network.fc(network.second(network.first(network.blocks(stem).mean((2, 3))).relu()))
    (expected,) = torch.autograd.grad(logits, stem, cotangent)
    whole = dict(zip(("logits", "stem", "gradient"), GradientGraph(network, ["stem"])(images, cotangent), strict=False))
    torch.testing.assert_close(whole["gradient"], expected)
    torch.testing.assert_close(results["logits"], logits.detach())
    in_pytorch(graph)


class Skip(nn.Module):
    """A dropout, which in eval mode returns its input itself, and a path around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        logits: Tensor = self.fc((self.drop(features).square() + features.exp()).mean((2, 3)))
        return logits


@pytest.mark.parametrize("layers", [["drop"], ["stem", "drop"]])
def test_the_gradient_of_a_layer_that_returns_its_input_excludes_the_path_around_it(layers: list[str]) -> None:
    graph = GradientGraph(Skip().eval(), layers)
    in_pytorch(graph)
    images, cotangent = random_inputs(graph, 3)
    results = dict(zip(graph.output_names, graph(images, cotangent), strict=True))
    feature = results["drop"]
    expected = 2 * feature * (cotangent @ graph.network.fc.weight)[:, :, None, None] / feature[0, 0].numel()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(results["gradient/drop"], expected.detach())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "network", "layer"), [(torch.float16, lambda: resnet(4, 1, 4), "layer2"), (torch.bfloat16, Transformer, "blocks.0")]
)
def test_half_precision_programs_are_as_exact_as_the_eager_graph(dtype: torch.dtype, network: Callable[[], nn.Module], layer: str) -> None:
    """Traced in half precision; images, features and gradients are float32."""
    graph = GradientGraph(network().to(dtype).eval(), [layer])
    program, inputs = traced(graph, (12, 8)), random_inputs(graph, 3, (12, 8))
    exact = GradientGraph(copy.deepcopy(graph.network).double(), [layer])(*(tensor.double() for tensor in inputs))
    for ours, eager, truth in zip(program.module()(*inputs), graph(*inputs), exact, strict=True):
        assert ours.dtype == eager.dtype == torch.float32
        assert (ours - truth).norm() <= 1.5 * (eager - truth).norm() + torch.finfo(dtype).eps * truth.norm()


@pytest.mark.slow
def test_height_and_width_are_dynamic_if_images_are_resized() -> None:
    graph = GradientGraph(resnet(4, 1, 4).eval(), ["layer2"], Preprocessing((14, 11)))
    free = BATCH | {2: Dim("height"), 3: Dim("width")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = trace.traced_program(graph, random_inputs(graph, 5, (17, 23)), (free, BATCH))
    for n, size in ((3, (9, 31)), (2, (14, 11)), (7, (40, 19))):
        inputs = random_inputs(graph, n, size)
        agree(program.module()(*inputs), graph, inputs)
