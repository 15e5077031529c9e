"""Layers that bring the student's features to the width of the teacher's, and the resizing of features.

Tokens have become a grid before they reach a loss, and a 1 x 1 convolution of a grid is one linear layer for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from kdx.distill.losses.base import Shapes
from kdx.distill.losses.pooling import adaptive_mean


def adapters(shapes: Shapes) -> nn.ModuleList:
    """One adapter per pair of layers: a 1 x 1 convolution where the widths differ, and nothing where they agree."""
    pairs = zip(shapes.student, shapes.teacher, strict=True)
    return nn.ModuleList(
        nn.Identity() if student[0] == teacher[0] else nn.Conv2d(student[0], teacher[0], kernel_size=1) for student, teacher in pairs
    )


def resized(features: Tensor, size: Sequence[int]) -> Tensor:
    """Features [n, C, H, W] at another resolution: averages of cells where it is coarser, bilinear interpolation otherwise."""
    height, width = size
    if tuple(features.shape[2:]) == (height, width):
        return features
    if height <= features.shape[2] and width <= features.shape[3]:
        return adaptive_mean(features, height, width)
    return functional.interpolate(features, size=(height, width), mode="bilinear", align_corners=False)


def embedding(features: Tensor) -> Tensor:
    """The mean over positions of features [n, C, H, W]: [n, C]. For most networks that is the input of the classifier."""
    return features.mean((2, 3))
