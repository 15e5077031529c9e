"""The loss of the student, and its rehearsal: a first batch before any training, so that mistakes show before hours of work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdx.distill.losses import LABELS, Batch, LabelLoss, Objective, Observed, Outputs, Shapes, method_requirements
from kdx.distill.networks import Distillation
from kdx.distill.number_formats import autocast
from kdx.distill.pairing import Pair
from kdx.distill.seeding import seeded
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph

_ADAPTERS, _REHEARSAL = 2, 3
"""The random streams of the initial weights of adapters and of the rehearsal, after those of the student and of the teacher."""


@dataclass(frozen=True)
class StudentLoss:
    """The student's objective, and what it observes of the networks at the matched pairs of layers."""

    student: Observed
    teacher: Observed
    objective: Objective
    pairs: Sequence[Pair]

    @classmethod
    def of_networks(
        cls,
        distillation: Distillation,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[Pair],
        graph: Callable[[nn.Module, Sequence[str]], FeatureGraph],
    ) -> StudentLoss:
        """The loss between these networks; ``graph`` makes their graphs. Raises KdxError for layers that cannot be compared."""
        settings = distillation.settings
        requirements = method_requirements(settings.method)
        matched = pairs[{"none": len(pairs), "last": -1, "all": 0}[requirements.pairs] :]
        if requirements.pairs != "none" and not matched:
            raise KdxError(
                f"The method {settings.method} matches features, and there is no pair of layers.",
                "Name them, student_layer=teacher_layer, or give larger images.",
            )
        teacher_graph = graph(teacher, [teacher_layer for _, teacher_layer in matched])
        student_graph = graph(student, [student_layer for student_layer, _ in matched])
        observed = Observed(student_graph, requirements), Observed(teacher_graph, requirements)
        return cls(*observed, _objective(distillation, *observed), matched)


def label_loss(distillation: Distillation) -> LabelLoss:
    """The cross entropy with smoothed labels."""
    return partial(functional.cross_entropy, label_smoothing=distillation.settings.label_smoothing)


def _objective(distillation: Distillation, student: Observed, teacher: Observed) -> Objective:
    """The student's objective, with adapters that fit the shapes of the layers and follow from the seed."""
    settings, device, images = distillation.settings, distillation.device, distillation.images["student"]
    with torch.no_grad():
        pixels = images.first(2)[0].to(device)
        outputs = {}
        for role, observed in (("student", student), ("teacher", teacher)):
            observed.graph.eval()
            outputs[role] = observed(pixels)
    shapes = Shapes(
        **{role: tuple(feature.shape[1:] for feature in output.features) for role, output in outputs.items()},
        classes=outputs["student"].logits.shape[1],
        labels=torch.from_numpy(distillation.dataset.labels[images.indices]),
    )
    with seeded(device, settings.seed, _ADAPTERS):
        return Objective(settings.method, shapes, settings, label_loss(distillation)).to(device)


def rehearse(distillation: Distillation, pairs: Sequence[Pair]) -> None:
    """Compute the student's loss and its gradient for the first images, with the networks as they are before training.

    Raises KdxError for layers that cannot be matched; for a loss that fails, or whose value or gradient is not finite; and for a user's own
    loss that does not depend on the student's outputs. Networks and random numbers of the training are not affected.
    """
    settings, device, images = distillation.settings, distillation.device, distillation.images["student"]
    loss = StudentLoss.of_networks(
        distillation,
        distillation.initial_network("student"),
        distillation.initial_network("teacher").requires_grad_(False),
        pairs,
        distillation.graph,
    )
    loss.student.graph.train()
    loss.teacher.graph.train(not distillation.teacher_is_trained)  # the running statistics of an untrained network fit no image
    loss.objective.train()
    count = min(len(images), math.ceil(settings.batch / (settings.accumulate * distillation.processes.count)))
    with seeded(device, settings.seed, _REHEARSAL):
        pixels, labels, positions = images.first(count)
        augmentation = distillation.augmentation
        draws = augmentation.draw(len(positions), np.random.default_rng(settings.seed))
        pixels, labels = augmentation.apply(pixels, labels, draws, np.arange(len(positions)))
        with autocast(settings, device):
            with torch.no_grad():
                teacher = loss.teacher(pixels.to(device))
            student = loss.student(pixels.to(device))
            parts = loss.objective(Batch(student, teacher, labels.to(device), torch.from_numpy(positions).to(device)))
        for name, part in parts.items():
            _check_part(name, part, student)


def _check_part(name: str, part: Tensor, student: Outputs) -> None:
    """Raise KdxError for a part of the loss that cannot train the student."""
    correction = "Correct it." if ":" in name else "Give it a smaller weight, or choose other layers."
    if not torch.isfinite(part):
        raise KdxError(f"The loss {name} is {float(part.detach())} for the first images, before any training.", correction)
    outputs = [student.logits, *student.features, *student.pre_activations, *([] if student.head is None else [student.head])]
    gradients: Sequence[Tensor | None] = [None]
    if part.requires_grad:
        wanted = [output for output in outputs if output.requires_grad]
        gradients = torch.autograd.grad(part, wanted, retain_graph=True, allow_unused=True)
    present = [gradient for gradient in gradients if gradient is not None]
    if ":" in name and not present:
        raise KdxError(
            f"The loss {name} does not depend on the student's outputs.", "Compute it from batch.student, without detaching its tensors."
        )
    if name != LABELS and not all(bool(torch.isfinite(gradient).all()) for gradient in present):
        raise KdxError(f"The gradient of the loss {name} is not finite for the first images, before any training.", correction)
