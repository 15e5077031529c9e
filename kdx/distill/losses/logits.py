"""Losses between the logits of student and teacher. Logits are [n, classes]."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from kdx.distill.losses.base import Batch, DistillationLoss, LossSettings, Requirements, Shapes
from kdx.errors import KdxError


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Soft targets: T^2 mean_i KL(softmax(t_i / T) || softmax(s_i / T)); logits [n, classes].

    The factor T^2 keeps the size of the gradient when the temperature T changes. The loss is at least 0, and 0 where the softmaxes agree.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", NIPS workshop 2014, arXiv:1503.02531 (2015).
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def standardised(logits: Tensor) -> Tensor:
    """Logits [n, classes] with mean 0 and standard deviation 1 in each row: z = (v - mean(v)) / sd(v), with sd^2 = mean (v - mean(v))^2.

    A loss of standardised logits does not depend on the shift and the positive scale of an image's logits, so the student need not imitate
    the size of the teacher's. The temperature then divides z. A constant row becomes 0.

    Source: Sun, Ren, Li, Wang and Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427.
    """
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    return torch.where(variance > 0, centred * torch.where(variance > 0, variance, 1).rsqrt(), 0)


def decoupled_kd(
    student_logits: Tensor, teacher_logits: Tensor, classes: Tensor, temperature: float, target: float = 1.0, nontarget: float = 8.0
) -> Tensor:
    """Decoupled knowledge distillation: T^2 (target TCKD + nontarget NCKD), averaged over images with true classes [n].

    With p = softmax(t/T) and q = softmax(s/T), c the true class, p^ and q^ the softmaxes over the other classes:

        TCKD = p_c log(p_c / q_c) + (1 - p_c) log((1 - p_c) / (1 - q_c)),   NCKD = KL(p^ || q^)

    `kd` equals T^2 (TCKD + (1 - p_c) NCKD): a teacher that is sure of the class hides what it knows of the others, and the decoupled form
    weights it independently. Both terms are at least 0, and 0 where the softmaxes agree. With two classes NCKD is 0.

    Source: Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679; ``target`` and ``nontarget``
    are its alpha and beta.
    """
    (s_target, s_rest, s_others), (t_target, t_rest, t_others) = (
        _decoupled(logits / temperature, classes) for logits in (student_logits, teacher_logits)
    )
    tckd = t_target.exp() * (t_target - s_target) + t_rest.exp() * (t_rest - s_rest)
    nckd = (t_others.exp() * (t_others - s_others)).sum(1)
    return temperature**2 * (target * tckd + nontarget * nckd).mean()


def _decoupled(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_c [n], log(1 - p_c) [n], and the log softmax of the other classes [n, classes - 1]."""
    is_target = functional.one_hot(classes, logits.shape[1]).bool()
    others = logits[~is_target].view(len(logits), -1)
    whole, rest = logits.logsumexp(1), others.logsumexp(1)
    return logits[is_target] - whole, rest - whole, others - rest[:, None]


def dist(student_logits: Tensor, teacher_logits: Tensor, temperature: float, inter: float = 2.0, intra: float = 2.0) -> Tensor:
    """DIST: T^2 (inter mean_i [1 - r(p_i, q_i)] + intra mean_c [1 - r(p^c, q^c)]).

    r is Pearson's correlation, p = softmax(t/T) and q = softmax(s/T). The first term correlates the classes within each image (rows), the
    second the images within each class (columns), so student and teacher must agree on relations and not on values: each term is 0 where
    the probabilities agree up to a positive scale and a shift per row or column. Each mean is in [0, 2]. The correlation with a constant
    row or column counts as 0.

    Source: Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536; ``inter`` and
    ``intra`` are its beta and gamma. The factor T^2 is that of the authors' code.
    """
    student, teacher = ((logits / temperature).softmax(1) for logits in (student_logits, teacher_logits))
    rows, columns = pearson(student, teacher), pearson(student.T, teacher.T)
    return temperature**2 * (inter * (1 - rows).mean() + intra * (1 - columns).mean())


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of each row of x [m, k] with that of y: [m], in [-1, 1]; 0 for a constant row."""
    return (_unit_rows(x - x.mean(1, keepdim=True)) * _unit_rows(y - y.mean(1, keepdim=True))).sum(1)


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to norm 1, except zeros. Dividing by the largest entry first keeps tiny probabilities from underflowing."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1)
    square = scaled.square().sum(1, keepdim=True)
    return scaled * torch.where(square > 0, square, 1).rsqrt()


def _prepared(batch: Batch, standardise: bool) -> tuple[Tensor, Tensor]:
    student, teacher = batch.student.logits, batch.teacher.logits
    return (standardised(student), standardised(teacher)) if standardise else (student, teacher)


_STANDARDISE = MappingProxyType({"standardise": (0, 1)})
"""The option is a switch."""


class SoftTargets(DistillationLoss):
    """`kd` with weight alpha, beside the cross entropy with weight 1 - alpha. standardise: of `standardised` logits, if 1."""

    requirements = Requirements(logits=True)
    option_ranges = _STANDARDISE

    def __init__(self, shapes: Shapes, settings: LossSettings, *, standardise: int = 0) -> None:
        super().__init__(shapes, settings)
        self.temperature, self.weight, self.label_weight = settings.temperature, settings.alpha, 1 - settings.alpha
        self.standardise = bool(standardise)

    def forward(self, batch: Batch) -> Tensor:
        return kd(*_prepared(batch, self.standardise), self.temperature)


class StandardisedSoftTargets(SoftTargets):
    """`kd` of `standardised` logits, with the weights of `SoftTargets`."""

    def __init__(self, shapes: Shapes, settings: LossSettings) -> None:
        super().__init__(shapes, settings, standardise=1)


class DecoupledKd(DistillationLoss):
    """`decoupled_kd` of a batch whose images have one class each."""

    requirements = Requirements(logits=True, classes=True)
    option_ranges = _STANDARDISE

    def __init__(
        self, shapes: Shapes, settings: LossSettings, *, target: float = 1.0, nontarget: float = 8.0, standardise: int = 0
    ) -> None:
        super().__init__(shapes, settings)
        self.temperature, self.target, self.nontarget = settings.temperature, target, nontarget
        self.standardise = bool(standardise)

    def forward(self, batch: Batch) -> Tensor:
        return decoupled_kd(
            *_prepared(batch, self.standardise), single_classes(batch, "dkd"), self.temperature, self.target, self.nontarget
        )


class Dist(DistillationLoss):
    """`dist` of a batch."""

    requirements = Requirements(logits=True)
    option_ranges = _STANDARDISE

    def __init__(self, shapes: Shapes, settings: LossSettings, *, inter: float = 2.0, intra: float = 2.0, standardise: int = 0) -> None:
        super().__init__(shapes, settings)
        self.temperature, self.inter, self.intra = settings.temperature, inter, intra
        self.standardise = bool(standardise)

    def forward(self, batch: Batch) -> Tensor:
        return dist(*_prepared(batch, self.standardise), self.temperature, self.inter, self.intra)


def single_classes(batch: Batch, method: str) -> Tensor:
    """The labels as classes [n]. Raises KdxError for mixed images, which have no single class."""
    if batch.labels.ndim != 1:
        raise KdxError(f"The method {method} needs one class per image, which mixed images do not have.", "Leave out mixup and cutmix.")
    return batch.labels
