"""The randomisation tests: the cascade itself, and maps that pass or fail them by construction."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.evaluate.randomisation import cascade, label_randomisation, model_randomisation, network_parts
from tests import oracle
from tests.explain.small_networks import Small, images, labels


class Deep(nn.Module):
    """A network with a container, a module without parameters, and a parameter of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shift = nn.Parameter(torch.randn(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
        self.head = nn.Linear(4, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(pixels + self.shift)).mean((2, 3)))
        return logits


def equal(one: nn.Module, other: nn.Module) -> set[str]:
    """The parameters and buffers that have equal values in both networks."""
    state = other.state_dict()
    return {name for name, value in one.state_dict().items() if torch.equal(value, state[name])}


def test_the_cascade_replaces_one_part_more_at_each_step() -> None:
    network, twin = Deep(0).eval(), Deep(1).eval()
    network.blocks[2][1].running_mean += 1  # type: ignore[index]
    assert network_parts(network) == ("head", "blocks.2.1", "blocks.2.0", "blocks.0", "stem")
    before = copy.deepcopy(network)
    random: set[str] = equal(network, twin)
    for part, changed in cascade(network, twin):
        names = {name for name in network.state_dict() if name.startswith(f"{part}.")}
        random |= names | ({"shift"} if part == "stem" else set())
        assert equal(changed, twin) == random and not changed.training
        assert equal(changed, network) >= set(network.state_dict()) - random
    assert len(equal(network, before)) == len(network.state_dict())  # the network itself does not change
    assert torch.equal(changed(images()), twin(images()))
    assert [part for part, _ in cascade(network, twin, ["blocks.0", "head"])] == ["blocks.0", "head"]


def edges() -> Tensor:
    """An edge detector: it does not read the network."""
    pixels = images().sum(1)
    return torch.nn.functional.pad((pixels.diff(dim=2)[:, :-1] ** 2 + pixels.diff(dim=1)[:, :, :-1] ** 2), (0, 1, 0, 1)).sqrt()


def features(network: nn.Module, layer: str) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda *inputs: seen.append(inputs[2]))
    try:
        network(images())
    finally:
        handle.remove()
    return seen[0].detach()


def gains(networks: Mapping[str, nn.Module], target: Tensor | None = None) -> Tensor:
    """The maps of RS(S) - RS(B) at the layer conv1."""
    student, base = (features(networks[role], "conv1") for role in ("student", "base"))
    return kdx.decompose(student, labels() if target is None else target, minus=base).maps


def test_an_edge_detector_fails_and_maps_of_the_networks_pass() -> None:
    networks = {"student": Small(1).eval(), "base": Small(2).eval()}
    twins = {"student": Small(7).eval()}

    def maps_of(current: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        grad_cam = kdx.grad_cam(current["student"], images(), "conv2", classes=labels()).maps
        return {"edges": edges(), "gains": gains(current), "grad_cam": grad_cam}

    result = model_randomisation(maps_of, networks, twins, (11, 9))
    failed, passed, classes = result.values()
    assert failed.steps == ("fc", "conv2", "norm", "conv1")
    assert oracle.error(failed.rank_correlation, torch.ones(4, 13)) < 1e-12 and oracle.error(failed.ssim, torch.ones(4, 13)) < 1e-12

    # The layers behind conv1 have no influence on its features.
    assert oracle.error(passed.rank_correlation[:3], torch.ones(3, 13)) < 1e-12
    assert float(passed.rank_correlation[3].max()) < 0.7 and float(passed.ssim[3].max()) < 0.7

    assert float(classes.rank_correlation[0].nanmean()) < 0.9  # Grad-CAM reads the head


def test_student_and_base_together() -> None:
    """With the twins of both, the last step has the maps of two untrained networks."""
    networks = {"student": Small(1).eval(), "base": Small(2).eval()}
    twins = {"student": Small(7).eval(), "base": Small(8).eval()}
    seen: list[Tensor] = []

    def maps_of(current: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        seen.append(gains(current))
        return {"gains": seen[-1]}

    model_randomisation(maps_of, networks, twins, (11, 9))
    assert len(seen) == 5
    assert oracle.error(seen[-1], gains(twins)) == 0 and oracle.error(seen[0], gains(networks)) == 0


def test_permuted_labels() -> None:
    networks = {"student": Small(1).eval(), "base": Small(2).eval()}

    def maps_of(target: Tensor) -> dict[str, Tensor]:
        return {"gains": gains(networks, target), "edges": edges()}

    first, again = (label_randomisation(maps_of, labels(), (11, 9), permutations=3, seed=5) for _ in range(2))
    assert first["gains"].steps == ("permutation 1", "permutation 2", "permutation 3")
    assert float(first["gains"].rank_correlation.mean()) < 0.8
    assert torch.equal(first["gains"].rank_correlation, again["gains"].rank_correlation)
    assert oracle.error(first["edges"].rank_correlation, torch.ones(3, 13)) < 1e-12


def test_mistakes() -> None:
    networks = {"student": Small(1).eval()}
    with pytest.raises(ValueError, match="does not have the parameters"):
        list(cascade(Small(1), Small(1, teacher=True)))
    with pytest.raises(ValueError, match="no part 'layer9'"):
        list(cascade(Small(1), Small(2), ["layer9"]))
    with pytest.raises(ValueError, match="at least one role"):
        model_randomisation(lambda _: {"edges": edges()}, networks, {}, (11, 9))
    with pytest.raises(ValueError, match="same parts: conv1, stem"):
        both = {**networks, "teacher": Small(3, teacher=True)}
        model_randomisation(lambda _: {"edges": edges()}, both, {"student": Small(2), "teacher": Small(4, teacher=True)}, (11, 9))
