"""What perturbed images are scored by: the probability of a class, or what the student has of it beyond the base."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdx.maps.gradients import class_probability

Logits = Callable[[Tensor], Tensor]
"""A network as a function from images [n, 3, h, w] to logits [n, classes]."""

Scoring = Callable[[Tensor], Tensor]
"""A function from images [n, 3, h, w] to one score per image [n], or k scores [n, k]. It is called with the same images in the same order,
perturbed in another way each time."""


def student_probability(student: Logits, classes: Tensor) -> Scoring:
    """p_S: the student's softmax probability of each image's class [n], in [0, 1].

    It asks what the student's own prediction depends on. A map of what the student has *beyond the base* need not do well: it may leave
    out what both networks use.
    """
    probability = class_probability(classes)
    return lambda images: probability(student(images))


def probability_gain(student: Logits, base: Logits, classes: Tensor) -> Scoring:
    """p_S - p_B: the student's probability of each image's class [n] minus the base's, in [-1, 1].

    This is kdx's question: what the student has beyond the base. Where both networks are certain of the class, the gain is near 0 on the
    whole image and depends on little, so curves of it are flat and noisy. It does not tell a gain of the student from a loss of the base.
    """
    both = probability_and_gain(student, base, classes)
    return lambda images: both(images)[:, 1]


def probability_and_gain(student: Logits, base: Logits, classes: Tensor) -> Scoring:
    """`student_probability` and `probability_gain` [n, 2], from one pass of each network."""
    probability = class_probability(classes)

    def scores(images: Tensor) -> Tensor:
        own = probability(student(images))
        return torch.stack([own, own - probability(base(images))], 1)

    return scores
