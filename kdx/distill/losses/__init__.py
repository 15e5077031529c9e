"""Distillation losses, one short function or class per method, the table of methods, and their combinations.

A new method is a class derived from `DistillationLoss` and one entry in ``METHODS``.
"""

from kdx.distill.losses.attention import attention_transfer
from kdx.distill.losses.base import LOSS_SETTINGS, Batch, DistillationLoss, LossSettings, Outputs, Requirements, Shapes
from kdx.distill.losses.logits import kd
from kdx.distill.losses.methods import METHODS, Method, Term, method_requirements, parse_method, source_hashes
from kdx.distill.losses.objective import LABELS, LabelLoss, Objective, summed

__all__ = [
    "LABELS",
    "LOSS_SETTINGS",
    "METHODS",
    "Batch",
    "DistillationLoss",
    "LabelLoss",
    "LossSettings",
    "Method",
    "Objective",
    "Outputs",
    "Requirements",
    "Shapes",
    "Term",
    "attention_transfer",
    "kd",
    "method_requirements",
    "parse_method",
    "source_hashes",
    "summed",
]
