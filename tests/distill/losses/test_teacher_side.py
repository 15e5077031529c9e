"""The teacher's side of every loss: nothing is stored for a backward pass, and batches in any order give the same loss."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdx import models
from kdx.distill import METHODS, Batch, Objective, Outputs, Shapes
from kdx.distill import losses as functions
from kdx.distill.losses import Observed, summed
from kdx.distill.losses.contrast import Contrast
from kdx.distill.teacher_outputs import teacher_outputs
from kdx.export.graphs import FeatureGraph
from tests.distill.losses.batches import SETTINGS, SHAPES, batch

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS_OF_IMAGES = torch.tensor([0, 1, 2, 3, 1, 2])


def observed(width: int, method: str) -> Observed:
    torch.manual_seed(width)
    network = models.load(f"kdx:resnet,width={width},depth=1", classes=4).module
    return Observed(FeatureGraph(network, ["layer2", "layer3"]), METHODS[method].requirements)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_stored_for_the_teachers_backward_pass(method: str) -> None:
    """Its parameters require gradients here, so autograd would record its pass if anything allowed it."""
    teacher, student = observed(5, method), observed(3, method)
    stored: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor)
        return tensor

    augmented: Any = SimpleNamespace(settings=replace(SETTINGS, augment=True))  # whose outputs are computed in every step
    from_teacher = teacher_outputs(augmented, teacher, "", None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs: Outputs = from_teacher(IMAGES, torch.arange(6))
    assert not stored
    assert not any(tensor.requires_grad for tensor in (outputs.logits, *outputs.features, *outputs.pre_activations))
    ours = student(IMAGES)
    of_student, of_teacher = (tuple(feature.shape[1:] for feature in part.features) for part in (ours, outputs))
    shapes = Shapes(of_student, of_teacher, 4, LABELS_OF_IMAGES)
    teacher.graph.requires_grad_(False)
    objective = Objective(method, shapes, SETTINGS)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed(objective(Batch(ours, from_teacher(IMAGES, torch.arange(6)), LABELS_OF_IMAGES, torch.arange(6))))
    weights = {parameter.untyped_storage().data_ptr() for parameter in teacher.graph.parameters() if parameter.ndim == 4}
    assert stored and not weights & {tensor.untyped_storage().data_ptr() for tensor in stored}
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.graph.parameters())
    assert student.graph.network.get_parameter("conv1.weight").grad is not None


def test_the_order_of_anchors_and_of_negatives_does_not_matter_to_the_contrast() -> None:
    torch.manual_seed(0)
    positive, negative, log_normaliser = torch.randn(6).double(), torch.randn(6, 9).double(), torch.tensor(1.0).double()
    rows, columns = torch.randperm(6), torch.randperm(9)
    permuted = functions.contrast(positive[rows], negative[rows][:, columns], log_normaliser, 50)
    torch.testing.assert_close(permuted, functions.contrast(positive, negative, log_normaliser, 50))


class AllOthers(Contrast):
    """The contrast with every image of another class as a negative, once, instead of random ones."""

    def _sampled(self, classes: Tensor) -> Tensor:
        labels = SHAPES.labels
        return torch.stack([torch.nonzero(labels != c)[: self.negatives, 0] for c in classes])


def test_the_order_of_a_batch_does_not_matter_to_the_banks() -> None:
    inputs, order = batch(), torch.randperm(8, generator=torch.Generator().manual_seed(2))
    assert inputs.indices is not None

    def permuted(outputs: Outputs) -> Outputs:
        return Outputs(outputs.logits[order], tuple(feature[order] for feature in outputs.features))

    other = Batch(permuted(inputs.student), permuted(inputs.teacher), inputs.labels[order], inputs.indices[order])
    losses, banks = [], []
    for given in (inputs, other):
        torch.manual_seed(0)
        contrast = AllOthers(SHAPES, SETTINGS, width=4)
        losses.append(contrast(given))
        banks.append(contrast.get_buffer("bank_student"))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(banks[0], banks[1])


def detached(outputs: Outputs) -> Outputs:
    features, before = (tuple(tensor.detach() for tensor in part) for part in (outputs.features, outputs.pre_activations))
    return Outputs(outputs.logits.detach(), features, before, None if outputs.head is None else outputs.head.detach())


@pytest.mark.parametrize("method", METHODS)
def test_every_loss_has_the_gradient_of_its_value(method: str) -> None:
    """By differences in float64, through the adapters, for the student's logits and last feature."""
    torch.manual_seed(0)
    objective = Objective(method, SHAPES, SETTINGS).double().eval()
    if method == "crd":
        objective.terms["crd"] = AllOthers(SHAPES, SETTINGS, width=4).double().eval()
    inputs = batch(torch.float64)
    student = detached(inputs.student)
    inputs = Batch(student, detached(inputs.teacher), inputs.labels, inputs.indices)
    objective(inputs)  # constants that follow from the first batch

    def loss(logits: Tensor, feature: Tensor) -> Tensor:
        features, before = ((*parts[:-1], feature) for parts in (student.features, student.pre_activations))
        outputs = Outputs(logits, features, before, student.head)
        value: Tensor = objective(Batch(outputs, inputs.teacher, inputs.labels, inputs.indices))[method]
        return value

    last = student.features[-1] + 0.1 * student.pre_activations[-1]  # away from the kink at 0
    x = [tensor.clone().requires_grad_() for tensor in (student.logits, last)]
    assert torch.autograd.gradcheck(loss, x, fast_mode=True, rtol=1e-4)
