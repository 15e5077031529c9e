"""A map that is zero in exact arithmetic is empty, and a small map that is not zero survives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.explain.graph import ReferenceImages, explainer_graph
from kdx.explain.settings import Settings
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import GradientGraph, Preprocessing
from kdx.features.target import Target
from kdx.models.network import Network
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from tests import oracle
from tests.explain.test_whole_set import measured
from tests.hooked import CLASSES, SIZE, batch, by_hand

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "instance without parameters": nn.InstanceNorm2d,
    "one group per channel": lambda channels: nn.GroupNorm(channels, channels),
}


def _normalised(norm: str, seed: int = 0) -> nn.Sequential:
    """The mean of "1", "2" or "3" over the positions has no influence: the normalisation subtracts it."""
    torch.manual_seed(seed)
    head = [nn.ReLU(), nn.Conv2d(10, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(16, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 10, 1), NORMS[norm](10), *head).eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [SIZE, (45, 38)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_class_maps_before_a_normalisation_of_every_channel(norm: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    images = batch(4, torch.float32, size)
    for layer in ("2", "3"):
        exact = by_hand(_normalised(norm).double(), images.double(), layer, None, "gap")
        assert float(exact.weights.abs().max()) < 1e-15
        result = kdx.grad_cam(_normalised(norm).to(dtype), images, layer)
        assert result.empty == 1.0 and not result.weights.any() and not result.scaled((20, 20)).any()
    assert kdx.grad_cam(_normalised(norm).to(dtype), images, "5").empty < 1
    assert kdx.hires_cam(_normalised(norm).to(dtype), images, "3").empty < 1


@pytest.mark.slow
def test_class_maps_of_an_exported_file(tmp_path: Path) -> None:
    path = tmp_path / "gradients.onnx"
    network = _normalised("one group per channel")
    onnx_file.write(GradientGraph(network, ["2", "5"]), path, origin=Origin("net", "0" * 64), image_size=SIZE)
    with OnnxRuntimeRunner(path) as runner:
        assert kdx.grad_cam(runner, batch(6, torch.float32), "2").empty == 1
        assert kdx.grad_cam(runner, batch(6, torch.float32), "5").empty == kdx.grad_cam(network, batch(6, torch.float32), "5").empty < 1


class _Nearly(nn.Module):
    """A head whose weights alternate in sign over the positions, plus a mean that is smaller by the factor ``share``."""

    def __init__(self, share: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        signs = (torch.arange(13)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
        self.register_buffer("pattern", (torch.rand(CLASSES, 6, 1, 1) + 0.5) * (signs + share * torch.randn(CLASSES, 6, 1, 1)))

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", self.features(images), self.get_buffer("pattern"))


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4])
def test_small_class_maps_survive(share: float) -> None:
    images = batch(8, torch.float32, (13, 8))
    exact = by_hand(_Nearly(share).double(), images.double(), "features", torch.full((8,), 2), "gap")
    result = kdx.grad_cam(_Nearly(share), images, "features", 2)
    assert float(exact.maps.max()) > 0 and oracle.error(result.maps, exact.maps) < 2e-6 / share
    assert result.empty == float((exact.maps == 0).flatten(1).all(1).double().mean())


class _PositionNorm(nn.Module):
    """The sum over channels of gradient times feature is zero at every position before this module."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).sqrt()


def test_hires_maps_before_a_normalisation_of_every_position() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 9, 3), _PositionNorm(), nn.Conv2d(9, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))
    images = batch(5, torch.float32)
    network(images)
    exact = by_hand(network.double(), images.double(), "0", None, "elementwise")
    assert float(exact.maps.max()) < 1e-15
    assert kdx.hires_cam(network.float(), images, "0").empty == 1.0
    assert kdx.grad_cam(network, images, "0").empty < 1


def test_the_empty_maps_of_a_batch_are_only_those_of_nothing_but_rounding() -> None:
    """An image of one colour has no gradient at any position that the alternating signs do not cancel."""
    network, images = _Nearly(0.0), batch(4, torch.float32, (13, 8))
    assert kdx.grad_cam(network, images, "features", 1).empty == 1.0
    assert kdx.hires_cam(network, images, "features", 1).empty == 0.0
    images[1] = 0
    with torch.no_grad():
        network.features.get_parameter("0.bias").zero_()
    assert kdx.hires_cam(network, images, "features", 1).empty == 0.25


def _features(norm: str, seed: int = 0) -> Tensor:
    with torch.no_grad():
        features: Tensor = _normalised(norm, seed)[:5](batch(16, torch.float32, (21, 17)))
        return features


LABELS = torch.arange(16) % 3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("mode", ["batch", "pooled given", "reference"])
def test_unicam_of_features_with_equal_means(norm: str, objective: Any, mode: str) -> None:
    """After the normalisation the spatial means of all images are equal, so the channel weights are exactly zero."""
    x, y = _features(norm), _features(norm, 1)[:, :7, ::2, ::2].relu()
    reference = kdx.ReferenceSet(x[:9], y[:9], LABELS[:9]) if mode == "reference" else None
    exact = kdx.unicam(x.double() - x.double().mean((2, 3), keepdim=True), y.double(), LABELS, objective)
    result = kdx.unicam(x, y, LABELS, objective, reference=reference)
    assert result.empty == 1.0 and not result.weights.any() and exact.empty == 1.0
    assert kdx.unicam(x, y, LABELS, objective, "elementwise", reference=reference).empty < 1
    assert kdx.unicam(x.relu(), y, LABELS, objective, reference=reference).empty < 1
    assert kdx.unicam(1e-25 * x, y, LABELS, objective).empty == 1.0


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("unit", [1.0, 1e-25])
def test_small_unicam_maps_survive(share: float, unit: float) -> None:
    """Means that differ by a small share of the features give small weights, which agree with those of float64."""
    x, y = _features("instance"), _features("instance", 1).relu()
    centred = x.double() - x.double().mean((2, 3), keepdim=True)
    means = torch.randn(16, 10, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = kdx.unicam(centred + share * means, y.double(), LABELS)
    result = kdx.unicam(((centred + share * means) * unit).float(), y, LABELS)
    assert exact.empty < 1 and oracle.error(result.maps, exact.maps) < max(1e-3, 1e-7 / share)
    assert abs(result.empty - exact.empty) <= 0.1


def test_unicam_before_a_normalisation() -> None:
    network, images = _normalised("instance"), batch(8, torch.float32, (21, 17))
    with torch.no_grad():
        explained, given = network[:6](images), _normalised("instance", 1)[:6](images)
    for layer, empty in (("2", True), ("3", True), ("0", False)):
        result = kdx.unicam_before(network, images, layer, explained, given, LABELS[:8], at="5")
        assert (result.empty == 1.0) == empty, layer


def test_the_share_of_empty_maps() -> None:
    maps = np.zeros((4, 2, 3))
    maps[1, 0, 2] = 1e-300
    weights = np.ones((4, 5))
    assert kdx.Maps(maps, weights, 0.5).empty == 0.75 and kdx.Maps(torch.from_numpy(maps), torch.from_numpy(weights), 0.5).empty == 0.75


@pytest.mark.parametrize("norm", ["instance", "one group per channel"])
def test_the_graph_of_an_explainer_file(norm: str) -> None:
    """After the normalisation the maps are empty; after the ReLU that follows they are those of the Explainer."""
    networks = {role: Network(role, _normalised(norm, seed), Preprocessing()) for seed, role in enumerate(("student", "base"))}
    images, labels = batch(12, torch.float32, (21, 17)), torch.arange(12) % 3
    graph = explainer_graph(networks, {"4": "4", "5": "5"})
    with torch.no_grad():
        outputs = dict(zip(graph.output_names, graph(images, nn.functional.one_hot(labels).float()), strict=True))
    student, base = (network.module for network in networks.values())
    with kdx.Explainer(student=student, base=base, layers=["4", "5"], runtime="eager", permutations=0) as explainer:
        layers = explainer(images, labels).layers
    assert not outputs["4/distilled/maps"].any() and layers["4"].distilled.empty == 1
    assert outputs["5/distilled/maps"].any() and layers["5"].distilled.empty < 1
    assert oracle.error(outputs["5/distilled/maps"], layers["5"].distilled.maps) < 1e-3
    references = explainer_graph(networks, {"4": "4", "5": "5"}, ReferenceImages(images, labels))
    with torch.no_grad():
        outputs = dict(zip(references.output_names, references(images[:3].flip(3), labels[:3]), strict=True))
    assert not outputs["4/distilled/maps"].any() and outputs["5/distilled/maps"].any()


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("unit", [2.0**-99, 1.0, 2.0**99])
def test_unicam_over_a_whole_set(objective: Any, unit: float) -> None:
    """Features with equal spatial means have empty maps; after a ReLU the maps are those of all images in one batch, in any unit."""
    given, settings = _features("instance", 1)[:, :7, ::2, ::2].relu(), Settings(permutations=1, objective=objective)
    unnormalised, labels = _features("instance"), Target.of(LABELS)
    measurement, maps = measured({"student": unit * unnormalised, "base": unit * given}, labels, settings)
    assert not maps["distilled"].any() and measurement.statistics["distilled"].empty == 1 and maps["residual"].any()
    expected = kdx.unicam(unnormalised.relu(), given, LABELS, objective)
    if objective == "relevance":  # uniqueness ignores the target, so it has no null
        assert measurement.null["distilled"].high == 0 < measurement.null["residual"].high
    _, maps = measured({"student": unit * unnormalised.relu(), "base": unit * given}, labels, settings)
    factor = unit if objective == "uniqueness" else 1  # L has the unit of a distance
    assert oracle.error(maps["distilled"] / factor, expected.maps) < oracle.TOLERANCE["float32"]
    expected = kdx.unicam(unnormalised.relu(), given, LABELS, objective, "elementwise")
    settings = replace(settings, weighting="elementwise")
    _, maps = measured({"student": unit * unnormalised.relu(), "base": unit * given}, labels, settings)
    assert oracle.error(maps["distilled"] / factor, expected.maps) < oracle.TOLERANCE["float32"]
