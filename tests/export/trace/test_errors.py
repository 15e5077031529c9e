"""Graphs that can be traced, and the errors of those that cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export import trace
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.models.resnet import resnet
from tests.export.trace.programs import BATCH, Behind, in_pytorch, traced


def test_a_feature_graph_is_traced_without_changes() -> None:
    graph = FeatureGraph(resnet(4, 1, 4).eval(), ["layer2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = trace.traced_program(graph, (torch.rand(5, 3, 12, 10),), (BATCH,))
    images = torch.rand(3, 3, 12, 10)
    for ours, theirs in zip(program.module()(images), graph(images), strict=True):
        torch.testing.assert_close(ours, theirs)


class Distances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x.flatten(2), x.flatten(2).sin())


class Dynamic(nn.Module):
    """A convolution whose kernel is computed from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x.mean((0, 2, 3)))
        return F.conv2d(x, kernel[:, None, None, None].expand(-1, 8, 1, 1))


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        (Distances(), "aten._cdist_backward"),
        pytest.param(nn.LocalResponseNorm(3), "aten.avg_pool3d_backward", marks=pytest.mark.slow),
        pytest.param(nn.AdaptiveMaxPool2d((5, 7)), "aten.adaptive_max_pool2d_backward", marks=pytest.mark.slow),
        (Dynamic(), "aten.convolution_backward"),
    ],
)
def test_the_error_names_an_unsupported_operator_with_its_module(module: nn.Module, operator: str) -> None:
    network = Behind(nn.Sequential(nn.ReLU(), nn.Sequential(module, nn.Tanh()))).eval()
    with pytest.raises(KdxError) as caught:
        traced(GradientGraph(network, ["layer"]))
    assert operator in caught.value.problem and "of rest.1.0" in caught.value.problem


def test_operators_before_the_layer_need_no_derivative() -> None:
    """The same operators before the layer: only a forward pass without an ONNX form is an error."""
    network = nn.Sequential(nn.LocalResponseNorm(2), nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    in_pytorch(GradientGraph(network, ["1"]))


class Ends(nn.Module):
    def __init__(self, forward: Callable[[Ends, Tensor], object]) -> None:
        super().__init__()
        self.layer, self.aside, self.fc = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3), nn.Linear(5, 4)
        self.ends = forward

    def forward(self, images: Tensor) -> object:
        return self.ends(self, images)


def test_the_error_names_a_layer_that_the_prediction_does_not_depend_on() -> None:
    def forward(net: Ends, x: Tensor) -> Tensor:
        net.aside(x)
        return net.fc(net.layer(x).mean((2, 3)))  # type: ignore[no-any-return]

    for layers in (["aside"], ["layer", "aside"]):
        with pytest.raises(KdxError, match="does not depend on layer 'aside'"):
            traced(GradientGraph(Ends(forward).eval(), layers))


def test_a_cotangent_before_the_layer_is_an_error() -> None:
    with pytest.raises(KdxError, match="layer1 does not depend on layer 'layer2'"):
        traced(GradientGraph(resnet(4, 1, 4).eval(), ["layer2"], at="layer1"))
    with pytest.raises(KdxError, match="both at layer 'layer1'"):
        GradientGraph(resnet(4, 1, 4), ["layer1"], at="layer1")


def test_integer_logits_are_an_error() -> None:
    graph = GradientGraph(Ends(lambda net, x: net.layer(x).mean((2, 3)).topk(4).indices).eval(), ["layer"])
    with warnings.catch_warnings(), pytest.raises(KdxError, match=r"does not return logits"):
        warnings.simplefilter("ignore")
        trace.traced_program(graph, (torch.rand(5, 3, 12, 10), torch.rand(5, 4)), (BATCH, BATCH))


def test_control_flow_that_depends_on_the_image_is_an_error() -> None:
    def forward(net: Ends, x: Tensor) -> Tensor:
        features = net.layer(x)
        return net.fc((features if features.sum() > 0 else -features).mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(Exception, match=r"(?s)data-dependent"):
        traced(GradientGraph(Ends(forward).eval(), ["layer"]))


def test_a_cotangent_of_another_shape_is_an_error() -> None:
    graph = GradientGraph(resnet(4, 1, 4).eval(), ["layer2"])
    with warnings.catch_warnings(), pytest.raises(KdxError, match="The cotangent has shape"):
        warnings.simplefilter("ignore")
        trace.traced_program(graph, (torch.rand(5, 3, 12, 10), torch.rand(5, 7)), (BATCH, BATCH))
