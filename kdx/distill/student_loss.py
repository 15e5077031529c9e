"""The loss of the student, and what it observes of the networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from kdx.distill.losses import LabelLoss, Objective, Observed, Shapes, method_requirements
from kdx.distill.networks import Distillation
from kdx.distill.pairing import Pair
from kdx.distill.seeding import seeded
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph

_ADAPTERS = 2
"""The random stream of the initial weights of adapters, after those of the student and of the teacher."""


@dataclass(frozen=True)
class StudentLoss:
    """The student's objective, and what it observes of the networks at the matched pairs of layers."""

    student: Observed
    teacher: Observed
    objective: Objective
    pairs: Sequence[Pair]

    @classmethod
    def of_networks(
        cls,
        distillation: Distillation,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[Pair],
        graph: Callable[[nn.Module, Sequence[str]], FeatureGraph],
    ) -> StudentLoss:
        """The loss between these networks; ``graph`` makes their graphs. Raises KdxError for layers that cannot be compared."""
        settings = distillation.settings
        requirements = method_requirements(settings.method)
        matched = pairs[{"none": len(pairs), "last": -1, "all": 0}[requirements.pairs] :]
        if requirements.pairs != "none" and not matched:
            raise KdxError(
                f"The method {settings.method} matches features, and there is no pair of layers.",
                "Name them, student_layer=teacher_layer, or give larger images.",
            )
        teacher_graph = graph(teacher, [teacher_layer for _, teacher_layer in matched])
        student_graph = graph(student, [student_layer for student_layer, _ in matched])
        observed = Observed(student_graph, requirements), Observed(teacher_graph, requirements)
        return cls(*observed, _objective(distillation, *observed), matched)


def label_loss(distillation: Distillation) -> LabelLoss:
    """The cross entropy with smoothed labels."""
    return partial(functional.cross_entropy, label_smoothing=distillation.settings.label_smoothing)


def _objective(distillation: Distillation, student: Observed, teacher: Observed) -> Objective:
    """The student's objective, with adapters that fit the shapes of the layers and follow from the seed."""
    settings, device, images = distillation.settings, distillation.device, distillation.images["student"]
    with torch.no_grad():
        pixels = images.first(2)[0].to(device)
        outputs = {}
        for role, observed in (("student", student), ("teacher", teacher)):
            observed.graph.eval()
            outputs[role] = observed(pixels)
    shapes = Shapes(
        **{role: tuple(feature.shape[1:] for feature in output.features) for role, output in outputs.items()},
        classes=outputs["student"].logits.shape[1],
        labels=torch.from_numpy(distillation.dataset.labels[images.indices]),
    )
    with seeded(device, settings.seed, _ADAPTERS):
        return Objective(settings.method, shapes, settings, label_loss(distillation)).to(device)
