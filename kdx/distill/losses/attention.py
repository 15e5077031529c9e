"""Losses between maps of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from kdx.distill.losses.base import Batch, DistillationLoss, LossSettings, Outputs, Requirements, Shapes
from kdx.distill.losses.pooling import adaptive_mean
from kdx.errors import KdxError
from kdx.kernels import geometry


def attention_transfer(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Attention transfer: the sum over layers of mean (Q_S - Q_T)^2, features [n, C, H, W].

    Q is the mean over channels of the squared feature, flattened to [n, H W] and scaled to unit L2 norm, so a feature's
    scale and number of channels do not matter. Where the teacher's resolution differs, its attention is resized
    (bilinear) to the student's. Raises ValueError if the numbers of layers differ. A layer with a single position has no attention:
    its loss is 0.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
    Attention Transfer", ICLR 2017, arXiv:1612.03928. As in the authors' code, the norm of the paper's formula is a mean of squares.
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
        for number, pair in enumerate(zip(shapes.student, shapes.teacher, strict=True), 1):
            if any(shape[1:].numel() == 1 for shape in pair):
                raise KdxError(
                    f"Attention transfer compares positions, and a layer of pair {number} has only one: features are {list(pair[0])} in the"
                    f" student and {list(pair[1])} in the teacher.",
                    "Name pairs of layers that return feature maps: student_layer=teacher_layer.",
                )

    def forward(self, batch: Batch) -> Tensor:
        return attention_transfer(batch.student.features, batch.teacher.features)


def class_attention(student_maps: Tensor, teacher_maps: Tensor, resolution: int = 2, *, normalise: bool = True) -> Tensor:
    """Class attention transfer: mean (A_S - A_T)^2 over images, classes and cells.

    student_maps, teacher_maps: class activation maps [n, classes, H, W], each the classifier's weights applied to the last feature, so
    that the mean over positions is the logit without its bias. A is the map averaged over the cells of a grid of ``resolution`` x
    ``resolution``; with ``normalise``, each class's A is divided by its L2 norm. The loss is at least 0, and 0 for equal maps.

    Source: Guo, Yan, Li and Lin, "Class Attention Transfer Based Knowledge Distillation", CVPR 2023, arXiv:2304.12777. The paper's formula
    normalises, and then the size of the logits does not matter; the authors' settings for CIFAR-100 do not.
    """
    student, teacher = (adaptive_mean(maps, resolution, resolution).flatten(2) for maps in (student_maps, teacher_maps))
    if normalise:
        student, teacher = functional.normalize(student, dim=2), functional.normalize(teacher, dim=2)
    return functional.mse_loss(student, teacher)


class ClassAttention(DistillationLoss):
    """`class_attention` of the last pair of layers, with weight 15.

    It needs networks whose logits are a linear function of the last layer's mean, as in most convolutional networks. Options:
    ``resolution``, and ``normalise`` (1 or 0). Without normalisation, large logits need a smaller weight.
    """

    requirements = Requirements(pairs="last", head=True)
    option_ranges = MappingProxyType({"resolution": (1, math.inf), "normalise": (0, 1)})

    def __init__(self, shapes: Shapes, settings: LossSettings, *, resolution: int = 2, normalise: int = 1) -> None:
        super().__init__(shapes, settings)
        self.weight = 15.0
        self.resolution, self.normalise = resolution, bool(normalise)
        if normalise and any(min(shape[-1][1:]) == 1 for shape in (shapes.student, shapes.teacher) if shape):
            raise KdxError(
                f"Class attention cannot be normalised for a layer with one position: features are {list(shapes.student[-1])} in the"
                f" student and {list(shapes.teacher[-1])} in the teacher.",
                "Give catkd,normalise=0, or name a layer with more positions.",
            )

    def forward(self, batch: Batch) -> Tensor:
        maps = [_class_maps(outputs) for outputs in (batch.student, batch.teacher)]
        return class_attention(maps[0], maps[1], self.resolution, normalise=self.normalise)


def _class_maps(outputs: Outputs) -> Tensor:
    if outputs.head is None:
        raise ValueError("catkd needs the weights of the classifiers")
    return torch.einsum("kc,nchw->nkhw", outputs.head, outputs.features[-1])
