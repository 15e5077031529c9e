"""Graphs against hooks, preprocessing and reshapes written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.export.layer_names import find_layer
from kdx.export.layouts import checked_feature
from kdx.models.resnet import resnet

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)


class Tiny(nn.Module):
    """Two layers that predict, one that never runs, one that fails on request."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.second = nn.Conv2d(5, 7, 2)
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(7, 4)
        self.fails = False

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.first(images).relu()).relu()
        if self.fails:
            raise ArithmeticError("in the middle")
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


class Returning(nn.Module):
    """A network that returns something other than logits."""

    def __init__(self, what: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.what = what

    def forward(self, images: Tensor) -> object:
        features = self.conv(images)
        return features if self.what is None else self.what


def hook_count(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) for child in module.modules())


# ---- the output of a layer ----


@pytest.mark.parametrize(
    ("feature", "description"),
    [
        ((torch.rand(2, 3, 4, 4), torch.rand(2)), "tuple"),
        ({"x": torch.rand(2, 3)}, "dict"),
        (7, "int"),
        (None, "NoneType"),
        (torch.ones(2, 3, 4, 4, dtype=torch.int64), "tensor [2, 3, 4, 4]"),
        (torch.rand(5), "tensor [5]"),
    ],
)
def test_an_output_that_is_not_a_feature_map_is_an_error_that_names_it(feature: object, description: str) -> None:
    with pytest.raises(KdxError) as caught:
        checked_feature(feature, "stage.3")
    assert description in caught.value.problem and "'stage.3'" in caught.value.problem


# ---- find_layer ----


def test_every_module_is_found_by_its_path() -> None:
    network = resnet(4, 1, 5)
    for path, module in network.named_modules():
        if path:
            assert find_layer(network, path) is module


@pytest.mark.parametrize("name", ["layr2", "layer22", "layer1.0.con1"])
def test_the_error_for_a_misspelt_layer_names_its_near_matches(name: str) -> None:
    network = resnet(4, 1, 5)
    with pytest.raises(KdxError) as caught:
        find_layer(network, name)
    near = caught.value.hint.removeprefix("Existing names: ").removesuffix(".").split(", ")
    assert {"layr2": "layer2", "layer22": "layer2", "layer1.0.con1": "layer1.0.conv1"}[name] in near
    assert all(find_layer(network, match) for match in near)


@pytest.mark.parametrize("name", ["", "zzzzzz"])
def test_the_error_for_the_root_or_an_unknown_layer_names_layers_that_exist(name: str) -> None:
    network = resnet(4, 1, 5)
    with pytest.raises(KdxError, match=f"no layer '{name}'") as caught:
        find_layer(network, name)
    for match in caught.value.hint.removeprefix("Existing names: ").removesuffix(".").split(", "):
        assert find_layer(network, match)


# ---- FeatureGraph ----


def by_hand(network: nn.Module, layers: Sequence[str], images: Tensor) -> tuple[Tensor, ...]:
    kept: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output, layer=layer: kept.__setitem__(layer, output))
        for layer in layers
    ]
    logits = network(images)
    for handle in handles:
        handle.remove()
    return logits, *(kept[layer] for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_graph_equals_hooks_and_preprocessing_by_hand(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = resnet(4, 1, 5).to(dtype).eval()
    layers = ("layer3", "layer1.0.conv2", "layer2")
    images = torch.rand(3, 3, 13, 9, dtype=dtype)
    normalized = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    outputs = FeatureGraph(network, layers, Preprocessing(None, MEAN, STD))(images)
    for ours, theirs in zip(outputs, by_hand(network, layers, normalized), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


def test_a_graph_converted_to_float64_agrees_with_float32() -> None:
    torch.manual_seed(0)
    graph = FeatureGraph(resnet(4, 1, 5).eval(), ["layer2"], Preprocessing((11, 7), MEAN, STD))
    images = torch.rand(3, 3, 9, 15)
    single = graph(images)
    for narrow, wide in zip(single, graph.double()(images.double()), strict=True):
        assert wide.dtype == torch.float64
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)  # float32 rounding through six convolutions


def test_halving_an_image_takes_means_of_2_x_2_blocks() -> None:
    """If an even image is halved, bilinear samples lie midway between two pixels in both directions."""
    images = torch.rand(2, 3, 10, 14, dtype=torch.float64)
    blocks = torch.stack([images[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    network = Tiny().double()
    resized = FeatureGraph(network, ["first"], Preprocessing((5, 7), MEAN, STD))(images)
    same = FeatureGraph(network, ["first"], Preprocessing(None, MEAN, STD))(blocks)
    for ours, theirs in zip(resized, same, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_image_of_the_right_size_is_not_changed_by_resizing() -> None:
    network, images = Tiny().double(), torch.rand(2, 3, 9, 11, dtype=torch.float64)
    for ours, theirs in zip(
        FeatureGraph(network, ["second"], Preprocessing((9, 11)))(images), FeatureGraph(network, ["second"])(images), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_flow_to_the_features() -> None:
    """d logit / d feature of the last convolution is the classifier's weight over the number of positions."""
    network = Tiny().double()
    logits, feature = FeatureGraph(network, ["second"])(torch.rand(3, 3, 9, 8, dtype=torch.float64) + 5)
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), feature)
    expected = (network.fc.weight[2] / (feature.shape[2] * feature.shape[3]))[None, :, None, None] * (feature > 0)
    torch.testing.assert_close(gradient, expected)


def test_gradients_flow_from_the_features_to_the_images() -> None:
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    network = Tiny().double()
    assert torch.autograd.gradcheck(lambda pixels: FeatureGraph(network, ["first"], Preprocessing((7, 5), MEAN, STD))(pixels)[1], images)


def test_a_graph_returns_tokens_as_a_grid() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 6, 4, 4)
            self.block = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patch(images).flatten(2).transpose(1, 2)
            out: Tensor = self.block(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
            return out[:, 0]

    network = Tokens()
    logits, patches, block = FeatureGraph(network, ["patch", "block"])(torch.rand(3, 3, 12, 12))
    assert torch.equal(patches, block)
    torch.testing.assert_close(logits, patches.mean((2, 3)))


def test_an_in_place_operator_does_not_overwrite_a_feature() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    network = nn.Sequential(conv, norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.rand(3, 3, 7, 5)
    logits, before, after = FeatureGraph(network, ["1", "2"])(images)
    torch.testing.assert_close(before, norm(conv(images)))
    assert bool((before < 0).any()) and torch.equal(after, before.relu())
    (gradient,) = torch.autograd.grad(logits.sum(), before)
    torch.testing.assert_close(gradient, (before > 0) / 15)


def test_hooks_are_removed_even_after_an_error() -> None:
    network = Tiny()
    graph = FeatureGraph(network, ["first", "second"])
    graph(torch.rand(2, 3, 7, 7))
    assert hook_count(network) == 0
    network.fails = True
    with pytest.raises(KdxError, match=r"The network raises ArithmeticError: in the middle\."):
        graph(torch.rand(2, 3, 7, 7))
    assert hook_count(network) == 0


def test_the_error_names_a_layer_that_does_not_run() -> None:
    with pytest.raises(KdxError, match=r"does not reach layer 'unused'"):
        FeatureGraph(Tiny(), ["first", "unused"])(torch.rand(2, 3, 7, 7))


@pytest.mark.parametrize("layer", ["", "third"])
def test_an_unknown_layer_is_an_error_before_the_pass(layer: str) -> None:
    with pytest.raises(KdxError, match=f"no layer '{layer}'"):
        FeatureGraph(Tiny(), ["first", layer])


@pytest.mark.parametrize("what", [None, 3, (torch.rand(2, 4, 1),), {"logits": torch.rand(2)}, torch.rand(2)])
def test_a_network_that_does_not_return_logits_is_an_error(what: object) -> None:
    with pytest.raises(KdxError, match="does not return logits"):
        FeatureGraph(Returning(what), ["conv"])(torch.rand(2, 3, 7, 7))


def test_a_graph_has_the_networks_weights_once_and_no_others() -> None:
    network = Tiny()
    graph = FeatureGraph(network, ["first", "second"], Preprocessing(None, MEAN, STD))
    assert [name.removeprefix("network.") for name in graph.state_dict()] == list(network.state_dict())
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in network.parameters())


# ---- layers with several outputs ----


class Pair(nn.Module):
    """A layer with two outputs, and a network that predicts from both."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.ModuleList([nn.Conv2d(3, 4, 2), nn.Conv2d(3, 5, 3)])
        self.pair = Several(self.both)
        self.fc = nn.Linear(9, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.cat([feature.square().mean((2, 3)) for feature in self.pair(images)], 1))
        return logits


class Several(nn.Module):
    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, images: Tensor) -> list[Tensor]:
        return [part(images) for part in self.parts]


def test_each_of_several_outputs_is_a_layer() -> None:
    network, images = Pair().double(), torch.rand(3, 3, 7, 6, dtype=torch.float64)
    _, second, first = FeatureGraph(network, ["pair[1]", "pair[0]"])(images)
    assert torch.equal(first, network.both[0](images)) and torch.equal(second, network.both[1](images))


def test_a_layer_with_several_outputs_needs_a_valid_index() -> None:
    images = torch.rand(3, 3, 7, 6)
    with pytest.raises(KdxError) as caught:
        FeatureGraph(Pair(), ["pair"])(images)
    assert "is list, not one feature map" in caught.value.problem and "pair[0]" in caught.value.hint
    with pytest.raises(KdxError, match=r"There is no 'pair\[2\]': pair has 2 outputs"):
        FeatureGraph(Pair(), ["pair[2]"])(images)
    with pytest.raises(KdxError, match=r"no layer 'par\[0\]'"):
        FeatureGraph(Pair(), ["par[0]"])


# ---- GradientGraph ----


def test_gradients_equal_those_of_autograd() -> None:
    """Of features captured by hand: from the logits, and from a later feature."""
    network = resnet(4, 1, 5).double().eval()
    images = torch.rand(3, 3, 13, 9, dtype=torch.float64)
    logits, *features = by_hand(network, ["layer1", "layer2", "layer3"], images)
    for end, at in ((logits, None), (features[2], "layer3")):
        cotangent = torch.randn(end.shape, dtype=torch.float64)
        expected = torch.autograd.grad(end, features[:2], cotangent, retain_graph=True)
        outputs = GradientGraph(network, ["layer2", "layer1"], at=at)(images, cotangent)
        for ours, theirs in zip(outputs, (logits, features[1], features[0], expected[1], expected[0]), strict=True):
            torch.testing.assert_close(ours, theirs.detach())
            assert not ours.requires_grad


def test_the_gradient_of_one_of_several_outputs() -> None:
    network, images = Pair().double(), torch.rand(3, 3, 7, 6, dtype=torch.float64)
    cotangent = torch.randn(3, 4, dtype=torch.float64)
    _, feature, gradient = GradientGraph(network, ["pair[1]"])(images, cotangent)
    expected = 2 * feature / 20 * (cotangent @ network.fc.weight[:, 4:])[:, :, None, None]
    torch.testing.assert_close(gradient, expected.detach())


def test_gradients_do_not_change_the_weights_flags_and_gradients() -> None:
    network = Tiny()
    network.fc.weight.requires_grad_(False)
    GradientGraph(network, ["first"])(torch.rand(2, 3, 7, 7), torch.rand(2, 4))
    assert [name for name, weight in network.named_parameters() if not weight.requires_grad] == ["fc.weight"]
    assert all(weight.grad is None for weight in network.parameters())
    assert hook_count(network) == 0


def test_a_gradient_graph_without_a_layer_is_an_error() -> None:
    with pytest.raises(KdxError, match="No layer is named to take the gradient at"):
        GradientGraph(Tiny(), [])
