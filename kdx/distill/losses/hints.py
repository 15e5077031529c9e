"""Losses between the features of paired layers, [n, C, H, W]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdx.distill.losses.adapters import adapters, resized
from kdx.distill.losses.base import Batch, DistillationLoss, LossSettings, Requirements, Shapes


def hints(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Hints: the sum over layers of mean (S - T)^2, where S is the student's feature after its adapter.

    The paper's 1/2 ||T - S||^2, as a mean over all elements, so that the size of a layer does not matter. A teacher's feature of another
    resolution is resized to the student's. The loss is at least 0, and 0 only for equal features. Raises ValueError if the numbers of
    layers differ.

    Source: Romero, Ballas, Kahou, Chassang, Gatta and Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550. The paper
    trains the layers up to one hint first and the whole student afterwards; here both losses are trained together, as in most comparisons.
    """
    pairs = zip(student_features, teacher_features, strict=True)
    return torch.stack([(student - resized(teacher, student.shape[2:])).square().mean() for student, teacher in pairs]).sum()


class Hints(DistillationLoss):
    """`hints` with 1 x 1 adapters where widths differ.

    The weight is 1. Comparisons on CIFAR-100 use 100 (``fitnet:100``), with which narrow networks at a high learning rate diverge.
    """

    requirements = Requirements(pairs="all", adapters=True)

    def __init__(self, shapes: Shapes, settings: LossSettings) -> None:
        super().__init__(shapes, settings)
        self.adapters = adapters(shapes)

    def forward(self, batch: Batch) -> Tensor:
        pairs = zip(self.adapters, batch.student.features, strict=True)
        return hints([adapter(feature) for adapter, feature in pairs], batch.teacher.features)


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """The feature overhaul's distance of one layer: mean over images of sum_j d(S_j, T_j), with T = max(teacher, margin) per channel.

        d(S, T) = 0 if S <= T <= 0, otherwise (S - T)^2

    student and teacher: features [n, C, H, W] before the activation. margin: [C], at most 0. Where the teacher's unit is off, the student's
    only has to be off too. The distance is at least 0.

    Source: Heo, Kim, Yun, Park, Kwak and Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv:1904.01866.
    """
    target = torch.maximum(teacher, margin.to(teacher.dtype)[:, None, None])
    both_off = (student <= target) & (target <= 0)
    return (student - target).square().masked_fill(both_off, 0).flatten(1).sum(1).mean()


class FeatureOverhaul(DistillationLoss):
    """The sum over layers l = 1 ... L of 2^(l - L) `partial_distance`, with weight 0.001 (the paper's alpha for CIFAR).

    Features are taken before the activation that ends their layer; those of the student pass through a 1 x 1 convolution and batch
    normalisation. The margin of a channel is the mean of the teacher's negative responses in all batches so far (0 without any). The
    paper computes it from the teacher's batch normalisation, which other families do not have.
    """

    requirements = Requirements(pairs="all", pre_activations=True, adapters=True)

    def __init__(self, shapes: Shapes, settings: LossSettings) -> None:
        super().__init__(shapes, settings)
        self.weight = 1e-3
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Conv2d(student[0], teacher[0], kernel_size=1, bias=False), nn.BatchNorm2d(teacher[0]))
            for student, teacher in zip(shapes.student, shapes.teacher, strict=True)
        )
        for index, (channels, *_) in enumerate(shapes.teacher):
            self.register_buffer(f"negatives{index}", torch.zeros(2, channels, dtype=torch.float64))  # their sum and their number

    def forward(self, batch: Batch) -> Tensor:
        total = batch.student.logits.new_zeros(())
        layers = zip(self.adapters, batch.student.pre_activations, batch.teacher.pre_activations, strict=True)
        for index, (adapter, student, teacher) in enumerate(layers):
            target = resized(teacher, student.shape[2:])
            distance = partial_distance(adapter(student), target, self._margin(index, target))
            total = total + distance / 2 ** (len(self.adapters) - 1 - index)
        return total

    def _margin(self, index: int, teacher: Tensor) -> Tensor:
        """The mean negative response per channel, updated by this batch in training mode."""
        negatives: Tensor = self.get_buffer(f"negatives{index}")
        if self.training:
            teacher = teacher.detach().double()
            negatives[0] += teacher.clamp(max=0).sum((0, 2, 3))
            negatives[1] += (teacher < 0).sum((0, 2, 3))
        return negatives[0] / negatives[1].clamp(min=1)
