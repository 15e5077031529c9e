"""Losses between the logits of student and teacher."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kdx.distill.losses.base import Batch, DistillationLoss, LossSettings, Requirements, Shapes


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Soft targets (Hinton, Vinyals & Dean 2015): T^2 mean_i KL(softmax(t_i / T) || softmax(s_i / T)); logits [n, classes].

    The factor T^2 keeps the size of the gradient when the temperature T changes. The loss is at least 0, and 0 where the softmaxes agree.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


class SoftTargets(DistillationLoss):
    """`kd` with weight alpha, beside the cross entropy with weight 1 - alpha."""

    requirements = Requirements(logits=True)

    def __init__(self, shapes: Shapes, settings: LossSettings) -> None:
        super().__init__(shapes, settings)
        self.temperature, self.weight, self.label_weight = settings.temperature, settings.alpha, 1 - settings.alpha

    def forward(self, batch: Batch) -> Tensor:
        return kd(batch.student.logits, batch.teacher.logits, self.temperature)
