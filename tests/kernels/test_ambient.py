"""PyTorch's ambient state changes no result: every public function gives the same bits inside it as outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.models.resnet import resnet
from tests import oracle
from tests.hooked import Net, batch

pytestmark = pytest.mark.usefixtures("no_gpu")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    with torch.device(device):
        yield


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "recorded gradients": torch.enable_grad,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "deterministic algorithms": deterministic,
    "another default device": lambda: default_device("meta"),
}

LABELS = torch.arange(19) % 4


X, Y = (features.float() for features in oracle.features()[:2])
MANY, PAIRS, TRIPLES = torch.cat([X, X + 1, Y.new_ones(1) * X.flip(0)] * 6)[:300], torch.arange(8) % 2, torch.arange(300) % 3
IMAGES, SMALL = batch(8, torch.float32, (32, 32)), batch(8, torch.float32)
NET = Net().eval()


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return resnet(4, 1, 5).eval()


NETWORKS = {role: _network(seed) for seed, role in enumerate(("student", "base", "teacher"))}
with torch.no_grad():
    FEATURES = {role: FeatureGraph(network, ["layer3"])(IMAGES)[1] for role, network in NETWORKS.items()}


def _geometry() -> list[Any]:
    x, y = X, Y
    reference = kdx.ReferenceSet(x[:12], y[:12], LABELS[:12])
    results: list[Any] = [
        kdx.unicam(x, y, LABELS),
        kdx.unicam(x, y, LABELS, lambda r: r.square().sum((-2, -1)).sqrt(), "elementwise"),
        kdx.unicam(x.numpy(), y.numpy(), LABELS.numpy(), "uniqueness", pooled=True),
        kdx.unicam(x, y, LABELS, reference=reference),
        kdx.decompose(x, LABELS, given=y),
        kdx.decompose(x, y),
    ]
    return [value for result in results for value in (result.maps, result.score)]


def _scores() -> list[Any]:
    x, y = X, Y
    scores = [
        kdx.fss(x, y, permutations=49),
        kdx.rs(x, LABELS, y, permutations=49),
        kdx.partial_rs(x, LABELS, y, "biased", permutations=49),
        kdx.rs(MANY, TRIPLES, batch=20, permutations=49),
        kdx.rs(MANY, TRIPLES, permutations=49),
        *kdx.compare({"a": {"student": x, "base": y}}, LABELS, permutations=49)["a"].scores.values(),
    ]
    return [value for score in scores for value in (score.value, *(score.interval or ()), score.p_value)]


def _class_maps() -> list[Any]:
    student = NETWORKS["student"]
    maps: list[Any] = [
        kdx.grad_cam(student, IMAGES),
        kdx.hires_cam(NET, SMALL, "conv2", 1),
        kdx.unicam_before(student, IMAGES, "layer2", FEATURES["student"], FEATURES["base"], PAIRS, at="layer3"),
    ]
    salient = kdx.salient_images(student, IMAGES, "layer2", noise=0.1)
    return [*(value for result in maps for value in (result.maps, result.weights)), salient]


def _explained() -> list[Any]:
    results: list[Any] = []
    for references in (False, True):
        settings: dict[str, Any] = {**NETWORKS, "permutations": 49, "features": "salient", "weighting": "elementwise"}
        with kdx.Explainer(layers="layer3", runtime="eager", **settings) as explainer:
            if references:
                explainer.use_references(IMAGES.flip(0), PAIRS)
            layer = explainer(IMAGES, PAIRS).layers["layer3"]
            results += [layer.distilled.maps, *(score.value for score in layer.scores.values())]
    results += kdx.models.layers(NET, (13, 9))
    return results


CALLS = {"geometry": _geometry, "scores": _scores, "class maps": _class_maps, "explainer": _explained}


def _same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return actual.dtype == expected.dtype and torch.equal(actual, expected) and not actual.is_inference()
    return bool(np.array_equal(actual, expected)) if isinstance(expected, np.ndarray) else bool(actual == expected)


@pytest.fixture(scope="module")
def outside() -> dict[str, list[Any]]:
    return {name: call() for name, call in CALLS.items()}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits_in_every_state(call: str, state: str, outside: dict[str, list[Any]]) -> None:
    with STATES[state]():
        actual = CALLS[call]()
    assert [_same(*pair) for pair in zip(actual, outside[call], strict=True)] == [True] * len(actual)


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (FeatureGraph, "bfloat16 autocast"),
        pytest.param(GradientGraph, "inference mode", marks=pytest.mark.slow),
        pytest.param(FeatureGraph, "float64 by default", marks=pytest.mark.slow),
        pytest.param(GradientGraph, "bfloat16 autocast", marks=pytest.mark.slow),
        pytest.param(GradientGraph, "float64 by default", marks=pytest.mark.slow),
    ],
)
def test_an_export_agrees_with_pytorch_in_every_state(kind: Any, state: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with STATES[state]():
        report = onnx_file.write(kind(NET, ["conv2"]), path, origin=Origin("net", "0" * 64), image_size=(13, 9))
    assert report and max(difference.max for difference in report.outputs.values()) < 1e-5


def test_a_network_and_images_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        network, images = Net().eval(), SMALL.clone()
    assert torch.equal(kdx.grad_cam(network, images, "conv2").maps, kdx.grad_cam(NET, SMALL, "conv2").maps)


def test_the_memory_format_changes_nothing() -> None:
    """The order of a sum may follow the memory, so the results agree within rounding."""
    x, y = (features.to(memory_format=torch.channels_last) for features in (X, Y))
    for actual, expected in ((kdx.unicam(x, y, LABELS), kdx.unicam(X, Y, LABELS)), (kdx.decompose(x, LABELS), kdx.decompose(X, LABELS))):
        assert oracle.error(actual.maps, expected.maps) < 1e-5 and actual.score == pytest.approx(expected.score, abs=1e-6)
    assert kdx.fss(x, y).value == pytest.approx(kdx.fss(X, Y).value, abs=1e-6)
    images = IMAGES.to(memory_format=torch.channels_last)
    for method in (kdx.grad_cam, kdx.hires_cam):
        assert oracle.error(method(NETWORKS["student"], images).maps, method(NETWORKS["student"], IMAGES).maps) < 1e-5
