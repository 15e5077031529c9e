"""The rehearsal of a distillation: its checks and a first batch before any training, so that mistakes show before hours of work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdx import models
from kdx.data.dataset import Dataset
from kdx.distill.losses import LABELS, Batch, Outputs
from kdx.distill.networks import Distillation, check_networks, training_preprocessing
from kdx.distill.number_formats import autocast, check_settings
from kdx.distill.pairing import Pair, layer_pairs
from kdx.distill.processes import SINGLE
from kdx.distill.seeding import seeded
from kdx.distill.settings import TrainingSettings
from kdx.distill.student_loss import StudentLoss
from kdx.errors import KdxError, about

_REHEARSAL = 3
"""The random stream of the rehearsal, after those of the initial weights of the student, the teacher and the adapters."""


def rehearse_chain(
    dataset: Dataset, references: Sequence[str], settings: TrainingSettings, layers: Sequence[str] | None, device: torch.device
) -> None:
    """Rehearse every distillation of a chain of networks: the teacher, its assistants and the student, each trained by the one before it.

    layers: the pairs of the last distillation. Only the images of a batch are read, and nothing is written. Raises the errors with which
    `kdx.distill.distill` would refuse the networks, the settings or the loss.
    """
    check_settings(settings, device, SINGLE)
    teacher = models.parse_reference(references[0]).located().with_classes(classes := len(dataset.classes))
    preprocessing = training_preprocessing(models.load(str(teacher), classes=classes), settings)
    for place, (above, below) in enumerate(pairwise(references), 2):
        with about(f"the distillation of {below} from {above}"):
            distillation = Distillation.prepare(
                dataset, Path(), settings, device, above, below, preprocessing=preprocessing, most=settings.batch
            )
            rehearse(distillation, layers if place == len(references) else None)


def rehearse(distillation: Distillation, layers: Sequence[str] | None) -> list[Pair]:
    """The pairs of layers of a distillation. Raises KdxError for layers, networks or a loss that cannot train the student."""
    pairs = layer_pairs(distillation, layers)
    check_networks(distillation)
    rehearse_loss(distillation, pairs)
    return pairs


def rehearse_loss(distillation: Distillation, pairs: Sequence[Pair]) -> None:
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
