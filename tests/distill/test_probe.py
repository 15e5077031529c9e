"""The scores of a probe against kdx.compare on the same features, and what a call leaves unchanged in a student and its program."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kdx
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models import Network
from kdx.roles import scores_among

pytestmark = pytest.mark.usefixtures("no_gpu")

IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 3


class Restless(nn.Module):
    """A classifier that changes itself in every pass, also in eval mode."""

    def __init__(self, seed: int, channels: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
            self.second = nn.Sequential(nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.Dropout(0.5))
            self.head = nn.Linear(channels, 3)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))
        self.passes, self.feature = 0, torch.zeros(1)

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        self.passes += 1
        feature: Tensor = self.second(self.first(images))
        self.feature = feature.detach()
        logits: Tensor = self.head(functional.dropout(feature, 0.1, training=True).mean((2, 3)))
        return logits


def features(network: nn.Module, layers: list[str], preprocessing: Preprocessing = Preprocessing()) -> list[Tensor]:
    graph = FeatureGraph(network, layers, preprocessing).eval()
    with torch.no_grad():
        parts = [graph(part)[1:] for part in IMAGES.split(10)]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize("roles", [(), ("base",), ("teacher",), ("base", "teacher")], ids=lambda roles: "+".join(roles) or "student alone")
def test_the_scores_are_those_of_compare_on_the_same_features(roles: tuple[str, ...]) -> None:
    networks = {"student": Restless(0), "base": Restless(1), "teacher": Restless(2, channels=6)}
    present = {role: networks[role] for role in ("student", *roles)}
    scores = kdx.probe(
        networks["student"], present.get("base"), present.get("teacher"), IMAGES, LABELS, ["first", "second=first"], batch=10
    )
    student_layers, teacher_layers = ["first", "second"], ["first", "first"]
    maps = {role: features(network, teacher_layers if role == "teacher" else student_layers) for role, network in present.items()}
    by_layer = {layer: {role: maps[role][place] for role in maps} for place, layer in enumerate(student_layers)}
    expected = kdx.compare(by_layer, LABELS, permutations=0)
    assert scores.layers == expected
    names = scores_among(("student", *roles))
    assert scores.row("val/") == {f"val/{layer}/{name}": expected[layer].scores[name].value for layer in student_layers for name in names}
    if "teacher" in roles:
        fss = kdx.fss(maps["student"][1], maps["teacher"][1], permutations=0)
        assert scores.row()["second/FSS(S,T)"] == pytest.approx(fss.value, rel=1e-12)


def test_a_network_with_preprocessing_and_labels_in_other_forms() -> None:
    preprocessing = Preprocessing((6, 6), (0.5,), (0.25,))
    student, teacher = Restless(0), Network("teacher", Restless(2), preprocessing)
    scores = kdx.probe(student, None, teacher, IMAGES.numpy(), LABELS.tolist(), "second", batch=10)
    (of_student,), (of_teacher,) = features(student, ["second"]), features(teacher.module, ["second"], preprocessing)
    assert scores.layers == kdx.compare({"second": {"student": of_student, "teacher": of_teacher}}, LABELS, permutations=0)
    one_hot = functional.one_hot(LABELS).double()
    assert kdx.probe(student, None, teacher, IMAGES, one_hot, "second", batch=10).row() == pytest.approx(scores.row())


def test_base_and_teacher_are_evaluated_once_and_arguments_may_change_afterwards() -> None:
    base, teacher, student, images, labels = Restless(1), Restless(2), Restless(0), IMAGES.clone(), LABELS.clone()
    passes = list[int]()
    for network in (base, teacher):
        network.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    probe = kdx.Probe(base, teacher, images, labels, ["second"])
    first = probe(student)
    seen = sum(passes)
    assert seen > 0
    for tensor in (images, labels, *base.parameters(), *teacher.parameters()):
        tensor.detach().zero_()
    assert probe(student) == first and sum(passes) == seen
    with torch.no_grad():
        next(student.first.parameters()).neg_()
    assert probe(student).row()["second/FSS(S,T)"] != first.row()["second/FSS(S,T)"]
    assert probe(student).row()["second/FSS(B,T)"] == first.row()["second/FSS(B,T)"]


def random_states() -> tuple[Any, ...]:
    legacy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), legacy[1].tolist(), legacy[2]  # type: ignore[index]


def pytorch_modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize(
    "context",
    [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["plain", "no_grad", "inference_mode", "autocast"],
)
def test_a_student_in_training_is_left_exactly_as_it_is(context: Callable[[], AbstractContextManager[object]]) -> None:
    student = Restless(0)
    student.first[1].eval()  # a frozen norm inside a network in training
    student.first[0].weight.requires_grad_(False)
    functional.cross_entropy(student(IMAGES), LABELS).backward()
    pending = functional.cross_entropy(student(IMAGES), LABELS)  # a recorded pass whose backward comes after the probe
    probe = kdx.Probe(Restless(1), Restless(2), IMAGES, LABELS, ["first", "second"])
    undisturbed = probe(student)

    def state() -> dict[str, Any]:
        return {
            "modes": {name: module.training for name, module in student.named_modules()},
            "tensors": {
                name: (id(tensor), tensor._version, tensor.tolist()) for name, tensor in student.state_dict(keep_vars=True).items()
            },
            "gradients": {
                name: (id(each.grad), None if each.grad is None else each.grad.tolist()) for name, each in student.named_parameters()
            },
            "requires_grad": {name: each.requires_grad for name, each in student.named_parameters()},
            "attributes": (student.passes, id(student.feature), student.feature.tolist()),
            "hooks": [len(module._forward_hooks) for module in student.modules()],
            "random": random_states(),
            "pytorch": pytorch_modes(),
        }

    with context():
        before = state()
        scores = probe(student)
        assert state() == before
    assert scores == undisturbed
    pending.backward()


def test_training_with_a_probe_gives_the_same_weights_bit_for_bit() -> None:
    def trained(probe: kdx.Probe | None) -> dict[str, Tensor]:
        torch.manual_seed(3)
        student = Restless(0)
        optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            for rows in torch.randperm(24).split(8):
                optimizer.zero_grad()
                functional.cross_entropy(student(IMAGES[rows]), LABELS[rows]).backward()
                optimizer.step()
            if probe is not None:
                probe(student)
        return student.state_dict()

    with_probe, without = trained(kdx.Probe(Restless(1), Restless(2), IMAGES, LABELS, ["second"])), trained(None)
    assert all(torch.equal(with_probe[name], tensor) for name, tensor in without.items())


def test_wrappers_of_a_student_are_left_out() -> None:
    probe, student = kdx.Probe(None, Restless(2), IMAGES, LABELS, ["first", "second"]), Restless(0)
    expected = probe(student)
    for wrapped in (torch.compile(student, backend="eager"), nn.DataParallel(student), torch.optim.swa_utils.AveragedModel(student)):
        assert probe(wrapped) == expected  # type: ignore[arg-type]


def test_what_a_probe_refuses() -> None:
    def error(**changes: Any) -> str:
        arguments: dict[str, Any] = {"base": None, "teacher": Restless(2), "images": IMAGES, "labels": LABELS, "layers": "second"}
        with pytest.raises(KdxError) as info:
            kdx.Probe(**(arguments | changes))(Restless(0))
        return str(info.value)

    assert "at least 4 images, and there are 3" in error(images=IMAGES[:3], labels=LABELS[:3])
    assert "10 rows of labels or class embeddings and 24 of features" in error(labels=LABELS[:10])
    assert "Teacher: The network has no layer 'third'" in error(layers="second=third")
    assert "Student: The network has no layer 'third'" in error(layers="third=second")
    with pytest.raises(KdxError, match="target"):  # before any network runs
        kdx.Probe(None, None, IMAGES, torch.zeros(24, dtype=torch.int64), "second")
    with pytest.raises(ValueError, match="batch must be 1 or more, not 0"):
        kdx.Probe(None, None, IMAGES, LABELS, "second", batch=0)


def test_the_number_of_images_per_pass_changes_scores_by_rounding_only() -> None:
    rows = [kdx.probe(Restless(0), None, Restless(2), IMAGES, LABELS, ["second"], batch=size).row() for size in (1, 7, 24)]
    for one, other in itertools.pairwise(rows):
        assert one == pytest.approx(other, abs=1e-6)
