"""Losses between maps of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdx.distill.losses.base import Batch, DistillationLoss, LossSettings, Requirements, Shapes
from kdx.kernels import geometry


def attention_transfer(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis 2017): the sum over layers of mean (Q_S - Q_T)^2, features [n, C, H, W].

    Q is the mean over channels of the squared feature, flattened to [n, H W] and scaled to unit L2 norm, so a feature's
    scale and number of channels do not matter. Where the teacher's resolution differs, its attention is resized
    (bilinear) to the student's. Raises ValueError if the numbers of layers differ.
    """
    losses = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        target = _attention(teacher)
        if target.shape[2:] != student.shape[2:]:
            target = functional.interpolate(target, size=student.shape[2:], mode="bilinear", align_corners=False)
        losses.append((_unit(_attention(student)) - _unit(target)).square().mean())
    return torch.stack(losses).sum()


def _attention(features: Tensor) -> Tensor:
    return geometry.wide(features).square().mean(1, keepdim=True)  # [n, 1, H, W]


def _unit(attention: Tensor) -> Tensor:
    return functional.normalize(attention.flatten(1))


class AttentionTransfer(DistillationLoss):
    """`attention_transfer` with weight beta/2."""

    requirements = Requirements(pairs="all")

    def __init__(self, shapes: Shapes, settings: LossSettings) -> None:
        super().__init__(shapes, settings)
        self.weight = settings.beta / 2

    def forward(self, batch: Batch) -> Tensor:
        return attention_transfer(batch.student.features, batch.teacher.features)
