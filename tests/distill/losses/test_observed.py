"""What losses see of networks: features before the activation, the classifier's weights, and pairs of layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kdx import models
from kdx.distill.losses import Observed, Requirements
from kdx.distill.number_formats import CompiledGraph
from kdx.distill.pairing import pairs_by_resolution
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, Preprocessing

BEFORE = Requirements(pairs="all", pre_activations=True)
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class InPlace(nn.Module):
    """A block and a plain layer whose activations overwrite their inputs, as in torchvision, and a layer without activation."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
        self.linear = nn.Conv2d(4, 5, 3)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.fc(self.relu(self.linear(self.block(images))).mean((2, 3)))
        return features


@pytest.mark.parametrize("graph_class", [FeatureGraph, partial(CompiledGraph, backend="eager")])
@pytest.mark.parametrize(
    "reference", ["kdx:resnet,width=4,depth=2", pytest.param("kdx:resnet,width=4,depth=1,block=bottleneck", marks=pytest.mark.slow)]
)
def test_pre_activations_of_residual_networks(reference: str, graph_class: Callable[..., FeatureGraph]) -> None:
    torch.manual_seed(0)
    graph = graph_class(models.load(reference).module, ["layer1", "layer3"], Preprocessing()).eval()
    plain = FeatureGraph(graph.network, graph.layers)(IMAGES)
    observed = Observed(graph, BEFORE)
    observed(IMAGES.flip(0))
    outputs = observed(IMAGES)
    assert torch.equal(outputs.logits, plain[0])
    for feature, expected, before in zip(outputs.features, plain[1:], outputs.pre_activations, strict=True):
        assert torch.equal(feature, expected) and torch.equal(before.relu(), feature)
        assert float(before.detach().min()) < 0
    outputs.pre_activations[0].sum().backward()
    assert graph.network.get_parameter("conv1.weight").grad is not None


def test_activations_in_place_do_not_overwrite_what_losses_need() -> None:
    torch.manual_seed(0)
    network = InPlace()
    expected = network(IMAGES)
    convolved = network.block[:3](IMAGES)
    outputs = Observed(FeatureGraph(network, ["block", "linear"]), BEFORE)(IMAGES)
    assert torch.equal(outputs.logits, expected)
    torch.testing.assert_close(outputs.pre_activations[0], convolved)
    alone = Observed(FeatureGraph(network, ["relu"]), BEFORE)(IMAGES)  # the layer is the activation itself
    torch.testing.assert_close(alone.pre_activations[0], outputs.features[1])
    assert torch.equal(outputs.pre_activations[1], outputs.features[1]) and float(outputs.features[1].detach().min()) < 0


def test_pre_activations_where_the_layout_needs_a_pass_of_its_own() -> None:
    """A feature whose channels, height and width are equal: other images decide which is which, and must not be taken for these."""
    torch.manual_seed(0)
    graph = FeatureGraph(InPlace(), ["block"])
    images = IMAGES[:, :, :8, :8]
    graph.network.train()
    outputs = Observed(graph, BEFORE)(images)
    assert outputs.pre_activations[0].shape == (3, 4, 4, 4)
    assert torch.equal(outputs.pre_activations[0].relu(), outputs.features[0])


def test_class_maps_have_the_logits_as_mean() -> None:
    torch.manual_seed(0)
    network = models.load("kdx:resnet,width=4,depth=1", classes=7).module
    graph = FeatureGraph(network, ["layer3"], Preprocessing(None, (0.5,), (0.2,))).eval()
    outputs = Observed(graph, Requirements(pairs="last", head=True))(IMAGES)
    assert outputs.head is not None and torch.equal(outputs.head, network.get_parameter("fc.weight"))
    maps = torch.einsum("kc,nchw->nkhw", outputs.head, outputs.features[0])
    torch.testing.assert_close(maps.mean((2, 3)) + network.get_parameter("fc.bias"), outputs.logits)
    with pytest.raises(KdxError, match="no linear classifier from the 4 channels of layer 'layer1' to its 7 classes"):
        Observed(FeatureGraph(network, ["layer1"]), Requirements(pairs="last", head=True))(IMAGES)


def test_layers_of_other_families_are_paired_by_resolution() -> None:
    student = {"a": (32, 32), "b": (16, 16), "c": (16, 16), "d": (8, 8)}
    teacher = {"stem": (64, 64), "s1": (32, 32), "s2": (16, 16), "s3": (8, 8), "s4": (4, 4)}
    assert pairs_by_resolution(student, teacher) == [("a", "s1"), ("c", "s2"), ("d", "s4")]
    transformer = {f"blocks.{index}": (16, 16) for index in range(12)}
    assert pairs_by_resolution(student, transformer) == [("d", "blocks.11")]
    assert pairs_by_resolution(transformer, student) == [("blocks.11", "d")]
    assert pairs_by_resolution(student, {"only": (3, 3)}) == [("d", "only")]
    assert pairs_by_resolution(student, {}) == []
