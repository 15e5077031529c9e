"""Knowledge review: a teacher's layer guides all of the student's layers from it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdx.distill.losses.adapters import resized
from kdx.distill.losses.base import Batch, DistillationLoss, LossSettings, Requirements, Shapes
from kdx.distill.losses.pooling import adaptive_mean

_LEVELS = (4, 2, 1)
_MOST_CHANNELS = 512


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """The hierarchical context loss of one layer: (mean (S - T)^2 + sum_k 2^-k mean (S_k - T_k)^2) / (1 + sum_k 2^-k).

    S_k and T_k are the features [n, C, H, W], averaged over the cells of grids of 4 x 4, 2 x 2 and 1 x 1; k counts those that are coarser
    than the feature. The loss is at least 0, and 0 only for equal features.

    Source: Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044.
    """
    loss, weight, total = functional.mse_loss(student, teacher), 1.0, 1.0
    for level in _LEVELS:
        if level < min(student.shape[2:]):
            weight /= 2
            total += weight
            coarse = [adaptive_mean(feature, level, level) for feature in (student, teacher)]
            loss = loss + weight * functional.mse_loss(coarse[0], coarse[1])
    return loss / total


class Fusion(nn.Module):
    """The attention-based fusion of a student's layer with the fused feature of the next deeper layer.

    x = norm(conv1x1(feature)); with y the deeper feature, resized: x' = a x + b y, where the maps a and b are sigmoids of a 1 x 1
    convolution of (x, y). Returns x', and norm(conv3x3(x')), which is compared with the teacher's feature.
    """

    def __init__(self, channels: int, middle: int, out: int, *, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(nn.Conv2d(middle, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        for layers in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(layers.get_parameter("0.weight"), a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        fused: Tensor = self.reduce(feature)
        if self.attention is not None and deeper is not None:
            deeper = functional.interpolate(deeper, size=fused.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([fused, deeper], 1))
            fused = weights[:, :1] * fused + weights[:, 1:] * deeper
        return fused, self.expand(fused)


class Review(DistillationLoss):
    """The sum over pairs of layers, from the deepest to the first, of `hierarchical_context` between `Fusion` and the teacher's feature.

    Pairs must be in the order from the first layer to the deepest. With one pair nothing is fused. A teacher's feature of another
    resolution is resized to the student's. Option ``width``: the channels of the fused features, by default those of the student's
    deepest layer, at most 512.
    """

    requirements = Requirements(pairs="all", adapters=True)

    def __init__(self, shapes: Shapes, settings: LossSettings, *, width: int = 0) -> None:
        super().__init__(shapes, settings)
        middle = width or min(_MOST_CHANNELS, shapes.student[-1][0])
        last = len(shapes.student) - 1
        self.fusions = nn.ModuleList(
            Fusion(student[0], middle, teacher[0], deepest=index == last)
            for index, (student, teacher) in enumerate(zip(shapes.student, shapes.teacher, strict=True))
        )

    def forward(self, batch: Batch) -> Tensor:
        losses, fused = [], None
        layers = list(zip(self.fusions, batch.student.features, batch.teacher.features, strict=True))
        for fusion, student, teacher in reversed(layers):
            fused, guided = fusion(student, fused)
            losses.append(hierarchical_context(guided, resized(teacher, guided.shape[2:])))
        return torch.stack(losses).sum()
