"""Distillation losses, one short function per method, and the table of methods.

A new method is one function ``(student, teacher, labels, settings) -> loss`` and one entry in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network for a batch: logits [n, classes] and one feature map [n, C, H, W] per layer."""

    logits: Tensor
    features: tuple[Tensor, ...] = ()


class LossSettings(Protocol):
    """The settings that losses read; `kdx.distill.TrainingSettings` has them."""

    @property
    def temperature(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def beta(self) -> float: ...


LOSS_SETTINGS = ("temperature", "alpha", "beta")
"""The names of the settings in `LossSettings`: a student's weights depend on them."""


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Soft targets (Hinton, Vinyals & Dean 2015): T^2 mean_i KL(softmax(t_i / T) || softmax(s_i / T)); logits [n, classes].

    The factor T^2 keeps the size of the gradient when the temperature T changes. The loss is at least 0, and 0 where the softmaxes agree.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


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
    return features.float().square().mean(1, keepdim=True)  # [n, 1, H, W]


def _unit(attention: Tensor) -> Tensor:
    return functional.normalize(attention.flatten(1))


def _kd(student: Outputs, teacher: Outputs, labels: Tensor, settings: LossSettings) -> Tensor:
    hard = functional.cross_entropy(student.logits, labels)
    return (1 - settings.alpha) * hard + settings.alpha * kd(student.logits, teacher.logits, settings.temperature)


def _at(student: Outputs, teacher: Outputs, labels: Tensor, settings: LossSettings) -> Tensor:
    hard = functional.cross_entropy(student.logits, labels)
    return hard + settings.beta / 2 * attention_transfer(student.features, teacher.features)


@dataclass(frozen=True)
class Method:
    """A distillation method: a description, its loss, and whether the loss reads features (otherwise no layer is computed)."""

    description: str
    loss: Callable[[Outputs, Outputs, Tensor, LossSettings], Tensor]
    uses_features: bool = False


METHODS: dict[str, Method] = {
    "kd": Method("soft targets: (1 - alpha) cross entropy + alpha T^2 KL (Hinton et al. 2015)", _kd),
    "at": Method("attention transfer: cross entropy + beta/2 mean (Q_S - Q_T)^2 (Zagoruyko & Komodakis 2017)", _at, uses_features=True),
}
