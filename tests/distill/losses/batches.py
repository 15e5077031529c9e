"""Batches of two small networks with different layers, for tests of losses."""

from __future__ import annotations

import torch
from torch import Tensor

from kdx.distill import Batch, Objective, Outputs, Shapes, TrainingSettings

N, IMAGES, CLASSES = 8, 24, 4
SETTINGS = TrainingSettings()
STUDENT = (torch.Size((3, 8, 8)), torch.Size((6, 4, 4)))
TEACHER = (torch.Size((5, 8, 8)), torch.Size((7, 6, 6)))
LABELS_OF_ALL = torch.arange(IMAGES) * 7 % CLASSES
SHAPES = Shapes(STUDENT, TEACHER, CLASSES, LABELS_OF_ALL)


def outputs(shapes: tuple[torch.Size, ...], seed: int, dtype: torch.dtype = torch.float32) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    before = tuple(random(N, *shape) for shape in shapes)
    return Outputs(2 * random(N, CLASSES), tuple(feature.relu() for feature in before), before, random(CLASSES, shapes[-1][0]))


def batch(dtype: torch.dtype = torch.float32) -> Batch:
    indices = torch.arange(N) * 3
    student = outputs(STUDENT, 0, dtype)
    for tensor in (student.logits, *student.features, *student.pre_activations, student.head):
        assert tensor is not None
        tensor.requires_grad_()
    return Batch(student, outputs(TEACHER, 1, dtype), LABELS_OF_ALL[indices], indices)


def objective(method: str, settings: TrainingSettings = SETTINGS) -> Objective:
    torch.manual_seed(0)
    return Objective(method, SHAPES, settings)
