"""Activation checkpointing and no_grad inside a network do not change its gradients, and its exceptions are quoted."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.export.passes import no_checkpointing

IMAGES = torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(0))
COTANGENT = torch.eye(5)[:4]


class Net(nn.Module):
    """A stem, a body that subclasses run in their own manner, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(3, 6, 3)
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True))
        self.fc = nn.Linear(6, 5)

    def run_body(self, features: Tensor) -> Tensor:
        result: Tensor = self.body(features)
        return result

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.run_body(self.stem(images)).mean((2, 3)))
        return logits


class Reentrant(Net):
    def run_body(self, features: Tensor) -> Tensor:
        return checkpoint(self.body, features, use_reentrant=True)  # type: ignore[no-any-return]


class NonReentrant(Net):
    def run_body(self, features: Tensor) -> Tensor:
        return checkpoint(self.body, features, use_reentrant=False)  # type: ignore[no-any-return]


class Segments(Net):
    def run_body(self, features: Tensor) -> Tensor:
        return checkpoint_sequential(self.body, 2, features, use_reentrant=False)  # type: ignore[no-any-return]


class Frozen(Net):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.run_body(self.stem(images))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


class FrozenBody(Net):
    @torch.no_grad()
    def run_body(self, features: Tensor) -> Tensor:
        return super().run_body(features)


def expected_gradient(layer: str) -> tuple[Tensor, Tensor]:
    """The feature and gradient of the plain network, by a graph of autograd without hooks."""
    network = Net().eval()
    parts = {"stem": 0, "body.0": 1, "body.1": 2, "body.2": 3}
    modules = [network.stem, *network.body]
    feature = IMAGES
    for module in modules[: parts[layer] + 1]:
        feature = module(feature)
    feature = feature.detach().requires_grad_()
    after = feature.clone()
    for module in modules[parts[layer] + 1 :]:
        after = module(after)
    (network.fc(after.mean((2, 3))) * COTANGENT).sum().backward()
    assert feature.grad is not None
    return feature.detach(), feature.grad


@pytest.mark.parametrize("layer", ["stem", "body.0", "body.1", "body.2"])
@pytest.mark.parametrize("cls", [Reentrant, NonReentrant, Segments, Frozen, FrozenBody])
def test_gradients_are_those_of_the_plain_network(cls: type[Net], layer: str) -> None:
    _, feature, gradient = GradientGraph(cls().eval(), [layer])(IMAGES, COTANGENT)
    expected, expected_grad = expected_gradient(layer)
    torch.testing.assert_close(feature, expected)
    torch.testing.assert_close(gradient, expected_grad)


def test_detach_still_cuts_the_gradient_and_the_error_names_it() -> None:
    class Detached(Net):
        def run_body(self, features: Tensor) -> Tensor:
            return super().run_body(features).detach()

    with pytest.raises(KdxError, match=r"does not depend on layer 'body.1'") as caught:
        GradientGraph(Detached().eval(), ["body.1"])(IMAGES, COTANGENT)
    assert "detach()" in caught.value.hint


def test_checkpointing_is_as_before_afterwards_and_in_other_threads() -> None:
    saved: list[bool] = []

    def recomputes() -> bool:
        """Whether the function runs a second time, in the backward pass."""
        runs = []

        def function(tensor: Tensor) -> Tensor:
            runs.append(1)
            return tensor.sin().exp()

        for reentrant in (True, False):
            checkpoint(function, torch.ones(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
        return len(runs) == 4

    originals = checkpointing.CheckpointFunction, checkpointing._checkpoint_without_reentrant_generator
    with no_checkpointing():
        with no_checkpointing():
            assert not recomputes()
        assert not recomputes()
        thread = threading.Thread(target=lambda: saved.append(recomputes()))
        thread.start()
        thread.join()
    assert saved == [True] and recomputes()
    assert originals == (checkpointing.CheckpointFunction, checkpointing._checkpoint_without_reentrant_generator)


def test_an_exception_of_the_network_is_quoted_by_type_and_first_line() -> None:
    class Wrong(Net):
        def run_body(self, features: Tensor) -> Tensor:
            raise LookupError("no such table.\nsecond line")

    with pytest.raises(KdxError) as caught:
        FeatureGraph(Wrong(), ["stem"])(IMAGES)
    assert caught.value.problem == "The network raises LookupError: no such table."
    assert isinstance(caught.value.__cause__, LookupError)
    with pytest.raises(KdxError, match=r"The network raises RuntimeError: .* expected input.* to have 3 channels"):
        FeatureGraph(Net(), ["stem"])(torch.rand(2, 6, 9, 9))


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(_context: object, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(_context: object, *_gradients: Tensor) -> Tensor:
        raise NotImplementedError("forward only")


def test_an_exception_of_the_backward_pass_is_quoted() -> None:
    class ForwardOnly(Net):
        def run_body(self, features: Tensor) -> Tensor:
            result: Tensor = FailingBackward.apply(super().run_body(features))  # type: ignore[no-untyped-call]
            return result

    with pytest.raises(KdxError, match="The backward pass of the network raises NotImplementedError: forward only"):
        GradientGraph(ForwardOnly().eval(), ["stem"])(IMAGES, COTANGENT)
