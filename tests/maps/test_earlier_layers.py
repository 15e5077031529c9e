"""UniCAM at an earlier layer against autograd straight through the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx import KdxError
from kdx.export.graphs import GradientGraph
from kdx.kernels import reference
from kdx.runtimes.eager import EagerRunner
from tests import oracle
from tests.hooked import SIZE, Net, agree, batch, cam_of_gradient, exported, hooked

LABELS = torch.arange(13) % 3


def teacher_features(n: int = 13) -> Tensor:
    with torch.no_grad():
        return hooked(Net(1).double().eval(), batch(n), "conv2")[1]


def objective(x: Tensor, y: Tensor, labels: Tensor, name: str, pooled: bool) -> Tensor:
    """The score of UniCAM from features, by the float64 definitions, for autograd."""
    x, y = (part.mean((2, 3)) if pooled else part.flatten(1) for part in (x, y))
    a, b = (reference.u_centered(reference.distances(part)) for part in (x, y))
    r = reference.residual(a, b)
    if name == "uniqueness":
        return reference.uniqueness(r)
    return reference.correlation(r, reference.u_centered(reference.distances(nn.functional.one_hot(labels).double())))


def straight(
    network: nn.Module, images: Tensor, layer: str, at: str, name: str, weighting: str, pooled: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(score, weights, maps, features of the later layer), by autograd from the score to the earlier layer."""
    _, earlier, later = hooked(network, images, layer, at)
    score = objective(later, teacher_features(len(images)), LABELS[: len(images)], name, pooled)
    (gradient,) = torch.autograd.grad(score, earlier)
    return score.detach(), *cam_of_gradient(earlier, gradient, weighting), later.detach()


@pytest.mark.parametrize("name", ["relevance", "uniqueness"])
@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_maps_equal_those_of_autograd_through_the_network(name: Any, weighting: Any, pooled: bool, layer: str) -> None:
    network, images = Net().double().eval(), batch(13)
    score, weights, maps, later = straight(network, images, layer, "conv3", name, weighting, pooled)
    options = {"objective": name, "weighting": weighting, "pooled": pooled}
    arguments = (layer, later, teacher_features(), LABELS)
    actual = kdx.unicam_before(network, images, *arguments, at="conv3", **options)
    assert oracle.error(actual.weights, weights) < oracle.TOLERANCE["float64"]
    assert oracle.error(actual.maps, maps) < oracle.TOLERANCE["float64"]
    assert actual.score == pytest.approx(float(score), rel=1e-9)
    with EagerRunner(GradientGraph(network, [layer], at="conv3"), torch.device("cpu")) as runner:
        parts = kdx.unicam_before(runner, images, *arguments, **options, chunk=4)
    agree(parts, actual, 1e-12)


def test_the_logits_can_be_the_feature_layer() -> None:
    network, images = Net().double().eval(), batch(13)
    _, weights, maps, later = straight(network, images, "conv3", "pool", "relevance", "gap")
    actual = kdx.unicam_before(network, images, "conv3", later, teacher_features(), LABELS, at="pool")
    agree(actual, kdx.Maps(maps, weights, 0.0))
    logits = network(images)
    vectors = kdx.unicam_before(network, images.numpy(), "conv3", logits.detach(), teacher_features(), LABELS, at="fc")
    assert isinstance(vectors.maps, np.ndarray) and vectors.maps.shape == maps.shape


@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
def test_maps_in_reference_mode(weighting: Any) -> None:
    """Each query is the last image of a batch with the references, and only its own gradient counts."""
    network, images = Net().double().eval(), batch(13)
    given, known = teacher_features(), 9
    _, _, _, later = straight(network, images, "conv1", "conv3", "relevance", weighting)
    among = kdx.ReferenceSet(later[:known], given[:known], LABELS[:known])
    queries = slice(known, None)
    actual = kdx.unicam_before(
        network, images[queries], "conv1", later[queries], given[queries], LABELS[queries], weighting=weighting, at="conv3", reference=among
    )
    for query in range(4):
        rows = [*range(known), known + query]
        plain = kdx.unicam_before(network, images[rows], "conv1", later[rows], given[rows], LABELS[rows], weighting=weighting, at="conv3")
        assert oracle.error(actual.maps[query], plain.maps[-1]) < oracle.TOLERANCE["float64"]
        assert oracle.error(actual.weights[query], plain.weights[-1]) < oracle.TOLERANCE["float64"]


@pytest.mark.slow
def test_maps_from_a_file(tmp_path: Path) -> None:
    network, images = Net().double().eval(), batch(13)
    _, weights, maps, later = straight(network, images, "conv1", "conv3", "relevance", "gap")
    path = exported(tmp_path, Net().eval(), ["conv1"], at="conv3")
    actual = kdx.unicam_before(path, images, "conv1", later, teacher_features(), LABELS)
    agree(actual, kdx.Maps(maps, weights, 0.0), oracle.TOLERANCE["float32"])
    with pytest.raises(KdxError, match="not of the logits"):
        kdx.grad_cam(path, images)
    with pytest.raises(ValueError, match="cotangent"):
        kdx.unicam_before(path, images, "conv1", later, teacher_features(), LABELS, at="conv3")


def test_small_gradients_survive_half_precision() -> None:
    """A score that is tiny beside its features has gradients below the range of float16."""
    network, images = Net().double().eval(), batch(13)
    _, weights, maps, later = straight(network, images, "conv1", "conv3", "relevance", "gap")
    small = 1e-9  # of the same score and of its gradients
    actual = kdx.unicam_before(Net().half(), images, "conv1", later, teacher_features(), LABELS, lambda r: small * scored(r), at="conv3")
    assert oracle.error(actual.maps / small, maps) < oracle.TOLERANCE["float16"]
    assert oracle.error(actual.weights / small, weights) < oracle.TOLERANCE["float16"]


def scored(r: Tensor) -> Tensor:
    return reference.correlation(r, reference.u_centered(reference.distances(nn.functional.one_hot(LABELS).double())))


def test_four_images_have_zero_maps_of_relevance() -> None:
    network, images = Net().double().eval(), batch(4)
    _, feature = hooked(network, images, "conv3")
    actual = kdx.unicam_before(network, images, "conv1", feature, teacher_features(4), torch.tensor([0, 1, 0, 1]), at="conv3")
    assert actual.maps.shape == (4, *SIZE) and actual.maps.max() == 0 and actual.weights.abs().max() == 0


def test_features_of_another_graph_are_refused() -> None:
    network, images = Net().double().eval(), batch(13)
    _, feature = hooked(network, images, "conv3")
    given = teacher_features()
    with pytest.raises(KdxError, match=r"cotangent has shape .*, and conv2"):
        kdx.unicam_before(network, images, "conv1", feature, given, LABELS, at="conv2")
    with pytest.raises(KdxError, match="12 rows of explained features and 13 of images"):
        kdx.unicam_before(network, images, "conv1", feature[:12], given[:12], LABELS[:12], at="conv3")
    with pytest.raises(KdxError, match="one class"):
        kdx.unicam_before(network, images, "conv1", feature, given, torch.zeros(13).long(), at="conv3")
    with pytest.raises(KdxError, match="does not depend on layer 'conv3'"):
        kdx.unicam_before(network, images, "conv3", given, feature, LABELS, at="conv2")
    with pytest.raises(KdxError, match="those of the logits"):
        kdx.unicam_before(network, images, "conv1", feature, given, LABELS)
    with pytest.raises(ValueError, match="weighting"):
        kdx.unicam_before(network, images, "conv1", feature, given, LABELS, weighting="hires", at="conv3")  # type: ignore[arg-type]
