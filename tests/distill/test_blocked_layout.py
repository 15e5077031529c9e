"""Networks compute in oneDNN's layout what they compute in PyTorch's: outputs, gradients and statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdx.distill import EpochResult, TrainingSettings, blocked_layout, distill
from kdx.distill.blocked_layout import BlockedGraph, suits
from kdx.distill.optimization import make_optimizer
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models import load
from tests.distill.small import QUICK, TEACHER, Interruption, stop_at

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")

PREPROCESSING = Preprocessing(mean=(0.4,), std=(0.3,))
IMAGES = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(2))


class Residual(nn.Module):
    """Two convolutions beside a shortcut with a third one."""

    def __init__(self, inputs: int, outputs: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=2, bias=False), nn.BatchNorm2d(outputs, affine=affine)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(features)))
        inner = self.bn2(self.conv2(inner))
        inner += self.shortcut(features)
        result: Tensor = self.relu(inner)
        return result


class Small(nn.Module):
    """A residual network; ``between`` is applied to the features before the second block."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda features: features, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.layer1, self.layer2 = Residual(32, 32, 1, affine), Residual(32, 48, 2, affine)
        self.between = between
        self.head = nn.Linear(48, 7)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer2(self.between(self.layer1(self.stem(images)))).mean((2, 3)))
        return logits


def passes(graph: FeatureGraph, images: Tensor, steps: int = 2) -> list[Tensor]:
    """Outputs and gradients of a few training steps, and the state afterwards."""
    results: list[Tensor] = []
    optimizer = torch.optim.SGD(graph.parameters(), 0.05)
    for _ in range(steps):
        outputs = graph(images)
        optimizer.zero_grad()
        torch.autograd.backward(sum((output.square().mean() for output in outputs), torch.zeros(())))
        optimizer.step()
        results += [output.detach() for output in outputs]
    results += [weight.grad for weight in graph.parameters() if weight.grad is not None]
    return [*results, *graph.network.state_dict().values()]


def assert_trains_alike(network: nn.Module, layers: list[str], tolerance: float = 1e-4) -> None:
    """For one of three sets of images: in a set, rounding may turn a ReLU on or off, which changes all gradients below it."""
    for share in (1.0, 0.9, 0.8):
        try:
            _assert_trains_alike(network, layers, tolerance, IMAGES * share)
        except AssertionError:
            if share == 0.8:
                raise
        else:
            return


def _assert_trains_alike(network: nn.Module, layers: list[str], tolerance: float, images: Tensor) -> None:
    plain = passes(FeatureGraph(copy.deepcopy(network), layers, PREPROCESSING), images)
    blocked = passes(BlockedGraph(copy.deepcopy(network), layers, PREPROCESSING), images)
    assert len(plain) == len(blocked) > len(layers)
    for expected, actual in zip(plain, blocked, strict=True):
        assert actual.layout is torch.strided
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * (1e-2 + float(expected.abs().max())))


@pytest.mark.parametrize("layers", [[], ["layer1", "layer2.conv1", "stem", "layer2"]])
def test_a_network_trains_alike(layers: list[str]) -> None:
    assert_trains_alike(Small().train(), layers)
    assert_trains_alike(Small(affine=False).train(), layers)


OTHER_OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda features: torch.cat([features[:, :16], features[:, 16:]], 1),
    "pad": lambda features: functional.pad(features, (1, 1, 1, 1)),
    "gate": lambda features: features * features.mean((2, 3), keepdim=True).sigmoid(),
    "silu": functional.silu,
    "scalar": lambda features: 0.5 * features + 1,
    "sum of two layouts": lambda features: features + torch.ones(1, 32, 1, 1),
    "weighted sum": lambda features: torch.add(features, features, alpha=2),
    "average": lambda features: functional.avg_pool2d(features, 2),
    "dilated pooling": lambda features: functional.max_pool2d(features, 2, 1, 0, 2),
    "rounded pooling": lambda features: functional.max_pool2d(features, 3, 2, ceil_mode=True),
    "places": lambda features: functional.max_pool2d(features, 2, return_indices=True)[0],
    "same": lambda features: functional.conv2d(
        features, torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(3)) / 17, padding="same"
    ),
    "fixed statistics": lambda features: functional.batch_norm(features, torch.zeros(32), torch.ones(32), torch.ones(32), torch.zeros(32)),
    "no statistics": lambda features: functional.batch_norm(features, None, None, training=True),
    "double": lambda features: features.double().cos().float(),
}


@pytest.mark.parametrize("operator", OTHER_OPERATORS)
def test_other_operators_take_features_back(operator: str) -> None:
    assert_trains_alike(Small(OTHER_OPERATORS[operator]).train(), ["layer2"])


@pytest.mark.parametrize("layers", [[], ["layer1", "layer2.conv1", "layer2.bn1", "stem"]])
def test_a_frozen_network_has_its_outputs_with_normalisation_folded(layers: list[str]) -> None:
    network = Small(affine=False).eval().requires_grad_(False)
    graph = BlockedGraph(network, layers, PREPROCESSING, frozen_for=(20, 20))
    assert len(graph._folded) == 7 - len({"layer2.conv1"} & set(layers))
    with torch.no_grad():
        for actual, expected in zip(graph(IMAGES), FeatureGraph(network, layers, PREPROCESSING)(IMAGES), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_that_is_used_otherwise_too_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.conv, self.twice, self.bn = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
            nn.init.uniform_(self.bn.running_mean, 0.5, 1)  # type: ignore[arg-type]

        def forward(self, images: Tensor) -> Tensor:
            raw = self.conv(images)
            features = self.bn(raw) + raw
            features = self.bn(self.twice(features)) + self.twice(features)
            logits: Tensor = features.mean((2, 3))
            return logits

    network = Shared().eval().requires_grad_(False)
    graph = BlockedGraph(network, [], PREPROCESSING, frozen_for=(20, 20))
    assert not graph._folded
    with torch.no_grad():
        torch.testing.assert_close(graph(IMAGES)[0], FeatureGraph(network, [], PREPROCESSING)(IMAGES)[0])


def zeroed(features: Tensor) -> Tensor:
    features[:, :1] = 0
    return features


def test_only_networks_that_compute_alike_and_convert_little_are_suited() -> None:
    network = Small().train()
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    assert suits(network, (20, 20))
    assert network.training and all(weight.grad is None for weight in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not suits(Small(OTHER_OPERATORS["silu"]), (20, 20))  # conversions
    assert not suits(Small(zeroed), (20, 20))  # what it changes would be a copy
    assert not suits(Small().double(), (20, 20))
    assert not suits(nn.Sequential(nn.Flatten(), nn.Linear(1200, 7)), (20, 20))  # nothing to gain


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "at"])
def test_a_distillation_in_either_layout_is_the_same(finished: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, method=method, student_images=60, epochs=2, learning_rate=0.01)
    student = "kdx:resnet,width=16,depth=1,stages=3"
    assert suits(load(student).module, (8, 8))

    def losses(name: str) -> list[float]:
        results: list[EpochResult] = []
        distill(
            "digits", teacher=f"{TEACHER}@{finished / 'teacher.safetensors'}", student=student, out=tmp_path / name, settings=settings,
            layers=["layer2"], device="cpu", report=results.append,
        )  # fmt: skip
        return [result.loss for result in results if result.loss is not None]

    blocked = losses("blocked")
    monkeypatch.setattr(blocked_layout, "suits", lambda *_: False)
    assert losses("plain") == pytest.approx(blocked, rel=1e-4) and losses("plain") != blocked


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_fused_optimizer_makes_the_steps_of_sgd(nesterov: bool) -> None:
    generator = np.random.default_rng(0)
    weight, gradients = generator.normal(size=(5, 3)), generator.normal(size=(3, 5, 3))
    parameter = nn.Parameter(torch.tensor(weight))
    optimizer = make_optimizer([parameter], TrainingSettings(learning_rate=0.1, weight_decay=0.01, momentum=0.8, nesterov=nesterov))
    assert optimizer.param_groups[0]["fused"]
    velocity = np.zeros_like(weight)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        decayed = gradient + 0.01 * weight
        velocity = 0.8 * velocity + decayed
        weight = weight - 0.1 * (decayed + 0.8 * velocity if nesterov else velocity)
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-12)


@pytest.mark.slow
def test_a_training_in_blocks_under_outputs_in_memory_resumes_to_the_same_weights(finished: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, student_images=60, epochs=3, batch=25, augment=False, flip=False)

    def trained(name: str, report: Callable[[EpochResult], None]) -> bytes:
        distill(
            "digits", teacher=f"{TEACHER}@{finished / 'teacher.safetensors'}", student="kdx:resnet,width=16,depth=1,stages=3",
            out=tmp_path / name, settings=settings, device="cpu", report=report,
        )  # fmt: skip
        return (tmp_path / name / "student.safetensors").read_bytes()

    with pytest.raises(Interruption):
        trained("resumed", stop_at("student", 2))
    assert trained("resumed", lambda _: None) == trained("whole", lambda _: None)
