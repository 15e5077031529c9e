"""The objective of a student: the cross entropy with the labels plus the weighted losses of its method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdx.distill.losses.base import Batch, LossSettings, Requirements, Shapes
from kdx.distill.losses.methods import method_requirements, own_code, parse_method
from kdx.errors import KdxError

LABELS = "labels"
"""The name of the objective's part from the labels."""

LabelLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits [n, classes] and labels (classes [n] or probabilities [n, classes]) -> scalar."""


class Objective(nn.Module):
    """The parts of a student's loss: w CE(student, labels) + sum_k f_k w_k L_k over the losses of a method.

    f_k is the factor in the method string and w_k the default weight of the loss (alpha of `kd`, beta/2 of `at`, otherwise 1). w is the
    smallest label weight of the losses: 1 - alpha with `kd`, otherwise 1.

    The loop trains `parameters()` (adapters) beside the student and discards them, and it stores and restores `state_dict()`, which also
    contains memory banks.
    """

    def __init__(self, method: str, shapes: Shapes, settings: LossSettings, label_loss: LabelLoss = functional.cross_entropy) -> None:
        super().__init__()
        self.requirements: Requirements = method_requirements(method)
        self.terms = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.label_weight = 1.0
        self.label_loss = label_loss
        for term in parse_method(method):
            loss = term.build(shapes, settings)
            key = term.name.replace(".", "/")  # the name of a submodule contains no dot
            self.terms[key] = loss
            self.weights[key] = loss.weight * term.factor
            self.label_weight = min(self.label_weight, loss.label_weight)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted parts by name. Their sum is the loss of the batch; its order is that of the dict.

        Everything is computed outside autocast, in float32 or more. The teacher's outputs must not require gradients. Raises KdxError if
        a user's own loss fails or is not a real scalar.
        """
        device = batch.student.logits.device.type
        with torch.autocast(device, enabled=False):
            batch = Batch(batch.student.wide(), batch.teacher.wide(), batch.labels, batch.indices)
            parts = {LABELS: self.label_weight * self.label_loss(batch.student.logits, batch.labels)}
            for key, loss in self.terms.items():
                name = key.replace("/", ".")
                with own_code(name):
                    value = loss(batch)
                if not isinstance(value, Tensor) or value.ndim != 0 or value.is_complex():
                    kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    raise KdxError(f"The loss {name} returns {kind}, not a scalar.", "Return one number as a tensor, such as its mean.")
                parts[name] = self.weights[key] * value
        return parts


def summed(parts: dict[str, Tensor]) -> Tensor:
    """The sum of the parts of an objective."""
    first, *others = parts.values()
    return sum(others, first)
