"""Distillation losses, one short function or class per method, the table of methods, and their combinations.

A new method is a class derived from `DistillationLoss` and one entry in ``METHODS``.
"""

from kdx.distill.losses.attention import attention_transfer, class_attention
from kdx.distill.losses.base import LOSS_SETTINGS, Batch, DistillationLoss, LossSettings, Outputs, Requirements, Shapes
from kdx.distill.losses.contrast import contrast
from kdx.distill.losses.hints import hints, partial_distance
from kdx.distill.losses.logits import decoupled_kd, dist, kd, pearson, standardised
from kdx.distill.losses.methods import METHODS, Method, Term, method_requirements, parse_method, source_hashes
from kdx.distill.losses.objective import LABELS, LabelLoss, Objective, summed
from kdx.distill.losses.observed import Observed
from kdx.distill.losses.relations import relational_angle, relational_distance
from kdx.distill.losses.review import hierarchical_context

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
    "Observed",
    "Outputs",
    "Requirements",
    "Shapes",
    "Term",
    "attention_transfer",
    "class_attention",
    "contrast",
    "decoupled_kd",
    "dist",
    "hierarchical_context",
    "hints",
    "kd",
    "method_requirements",
    "parse_method",
    "partial_distance",
    "pearson",
    "relational_angle",
    "relational_distance",
    "source_hashes",
    "standardised",
    "summed",
]
