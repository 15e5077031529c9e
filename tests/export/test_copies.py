"""Copies of networks whose attributes refuse to be copied, and of compiled ones."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdx.export.copies import copied

IMAGES = torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers; a subclass adds an attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.first(images).relu().mean((2, 3)))
        return logits


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self.by_name = {"first": self.first, "lock": self.lock}

    def forward(self, images: Tensor) -> Tensor:
        with self.lock:
            logits: Tensor = self.fc(self.by_name["first"](images).relu().mean((2, 3)))  # type: ignore[operator]
        return logits


class Storing(Net):
    """Keeps its features, with their history, as an attribute and in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.latest = self.first(images).relu()
        self.kept.append(("first", self.latest))
        logits: Tensor = self.fc(self.latest.mean((2, 3)))
        return logits


def weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = Net()
        nn.utils.weight_norm(network.first)
        return nn.utils.spectral_norm(network.fc) and network


@pytest.mark.parametrize("make", [Locked, Storing, weight_norm])
def test_a_network_that_deepcopy_refuses_is_copied(make: Callable[[], nn.Module]) -> None:
    network = make()
    network(IMAGES).square().sum().backward()  # a training step
    network.eval()
    with pytest.raises((TypeError, RuntimeError)):
        copy.deepcopy(network)
    expected = network(IMAGES)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    duplicate = copied(network)
    torch.testing.assert_close(duplicate(IMAGES), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    torch.testing.assert_close(network(IMAGES), expected, rtol=0, atol=0)


def test_references_between_attributes_are_kept_and_containers_are_not_shared() -> None:
    network = Storing()
    network(IMAGES)
    duplicate = copied(network)
    assert len(duplicate.kept) == 1 and duplicate.kept[0][1] is not network.kept[0][1]
    duplicate(IMAGES)
    assert len(network.kept) == 1 and network.kept[0][1].requires_grad
    locked = Locked()
    assert copied(locked).by_name["first"] is not locked.first
    locked_copy = copied(locked)
    assert locked_copy.by_name["first"] is locked_copy.first


class Compiled(Net):
    """A compiled part, a compiled method, and a compiled instance attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.compile(self.first, backend="eager")  # type: ignore[assignment]
        self.head = torch.compile(self.head_of, backend="eager")

    def head_of(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(features)
        return logits

    @torch.compile(backend="eager")
    def pooled(self, features: Tensor) -> Tensor:
        return features.relu().mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pooled(self.first(images)))


@torch.no_grad()
def test_compiled_code_is_removed_from_a_copy() -> None:
    network = Compiled().eval()
    expected = network(IMAGES)
    duplicate = copied(network)
    calls: list[str] = []
    for name in ("first", "fc"):
        duplicate.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    torch.testing.assert_close(duplicate(IMAGES), expected)
    assert calls == ["first", "fc"] and "first" in dict(duplicate.named_modules())
    assert "first._orig_mod" in dict(network.named_modules())
