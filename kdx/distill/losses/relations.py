"""Relational knowledge distillation: distances and angles between the images of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kdx.distill.losses.adapters import embedding
from kdx.distill.losses.base import Batch, DistillationLoss, LossSettings, Requirements, Shapes


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over pairs i != j of huber(psi_ij(student) - psi_ij(teacher)), for embeddings [n, d] of any widths.

    psi_ij = ||x_i - x_j|| / mean of these over pairs, and huber(u) = u^2 / 2 for |u| <= 1, |u| - 1/2 beyond. Neither network's scale,
    shift or rotation matters; the loss is at least 0, and 0 for equal geometries. It is 0 for fewer than three images, because the
    only distance of a pair is its own mean.

    Source: Park, Kim, Lu and Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068.
    """
    if len(student) < 3:
        return 0 * student.sum()
    return functional.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def _relative_distances(x: Tensor) -> Tensor:
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, 1)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over triples of different images of huber(cos_ijk(student) - cos_ijk(teacher)), for embeddings [n, d] of any widths.

    cos_ijk is the cosine of the angle at x_j between x_i and x_k (0 where two of them coincide). Scale, shift and rotation do not matter;
    the loss is at least 0, and 0 for equal geometries. It is 0 for fewer than three images. Memory grows with n^3 and n^2 d.

    Source: as `relational_distance`.
    """
    n = len(student)
    if n < 3:
        return 0 * student.sum()
    same = torch.eye(n, dtype=torch.bool, device=student.device)
    different = ~(same[:, :, None] | same[:, None, :] | same[None])
    return functional.smooth_l1_loss(_cosines(student)[different], _cosines(teacher)[different])


def _cosines(x: Tensor) -> Tensor:
    """[n, n, n]: at (j, i, k), the cosine of the angle at x_j between x_i and x_k."""
    differences = x[None] - x[:, None]
    square = differences.square().sum(2, keepdim=True)
    units = differences * torch.where(square > 0, square, 1).rsqrt()
    return units @ units.mT


class Relations(DistillationLoss):
    """25 `relational_distance` + 50 `relational_angle` (options ``distance`` and ``angle``) of the mean feature of the last pair."""

    requirements = Requirements(pairs="last")

    def __init__(self, shapes: Shapes, settings: LossSettings, *, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__(shapes, settings)
        self.distance, self.angle = distance, angle

    def forward(self, batch: Batch) -> Tensor:
        student, teacher = embedding(batch.student.features[-1]), embedding(batch.teacher.features[-1])
        return self.distance * relational_distance(student, teacher) + self.angle * relational_angle(student, teacher)
