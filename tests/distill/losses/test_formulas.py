"""Each loss equals its formula in NumPy, has the gradient of its formula, and has the properties that its paper states."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kdx.distill import losses
from tests.distill.losses import slow_formulas as slow

CLASSES = [0, 3, 2, 2, 1, 4]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS = random(6, 5, scale=2), random(6, 5, seed=1, scale=3)
FEATURES = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
EMBEDDINGS = random(6, 4), random(6, 7, seed=1)
MARGIN = -random(4, seed=2).abs() / 4
SIMILARITIES = random(6, seed=3), random(6, 9, seed=4)

Loss = Callable[[Tensor, Tensor], Tensor]


def standardised_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return losses.kd(losses.standardised(student), losses.standardised(teacher), 2.0)


def single(loss: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Loss:
    return lambda student, teacher: loss([student], [teacher])


BY_NAME: dict[str, tuple[Loss, tuple[Tensor, Tensor]]] = {
    "kd": (partial(losses.kd, temperature=3.0), LOGITS),
    "lskd": (standardised_kd, LOGITS),
    "dkd": (partial(losses.decoupled_kd, classes=torch.tensor(CLASSES), temperature=3.0, target=0.7, nontarget=5.0), LOGITS),
    "dist": (partial(losses.dist, temperature=2.0, inter=1.5, intra=0.5), LOGITS),
    "fitnet": (single(losses.hints), FEATURES),
    "at": (single(losses.attention_transfer), FEATURES),
    "ofd": (partial(losses.partial_distance, margin=MARGIN), FEATURES),
    "rkd distance": (losses.relational_distance, EMBEDDINGS),
    "rkd angle": (losses.relational_angle, EMBEDDINGS),
    "reviewkd": (losses.hierarchical_context, FEATURES),
    "catkd": (losses.class_attention, FEATURES),
    "catkd not normalised": (partial(losses.class_attention, normalise=False), FEATURES),
}

EXPECTED: dict[str, Callable[[slow.Array, slow.Array], float]] = {
    "lskd": partial(slow.standardised_kd, temperature=2.0),
    "dkd": partial(slow.decoupled_kd, classes=CLASSES, temperature=3.0, alpha=0.7, beta=5.0),
    "dist": partial(slow.dist, temperature=2.0, beta=1.5, gamma=0.5),
    "fitnet": slow.hints,
    "ofd": partial(slow.partial_distance, margin=MARGIN.numpy()),
    "rkd distance": slow.relational_distance,
    "rkd angle": slow.relational_angle,
    "reviewkd": partial(slow.hierarchical_context, levels=(4, 2, 1)),
    "catkd": partial(slow.class_attention, cells=2, normalise=True),
    "catkd not normalised": partial(slow.class_attention, cells=2, normalise=False),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_loss_is_its_formula(name: str) -> None:
    loss, (student, teacher) = BY_NAME[name]
    assert float(loss(student, teacher)) == pytest.approx(EXPECTED[name](student.numpy(), teacher.numpy()), rel=1e-9)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_loss_has_the_gradient_of_its_formula(name: str) -> None:
    loss, (student, teacher) = BY_NAME[name]
    student, teacher = student[:, :4, :4, :4] if student.ndim == 4 else student, teacher[:, :4, :4, :4] if teacher.ndim == 4 else teacher
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student.clone().requires_grad_())


@pytest.mark.parametrize("name", BY_NAME)
def test_a_loss_is_zero_for_equal_outputs_and_positive_for_others(name: str) -> None:
    loss, (student, teacher) = BY_NAME[name]
    assert abs(float(loss(teacher, teacher.clone()))) < 1e-12 or name == "ofd"  # whose target is not below the margin
    assert float(loss(student, teacher)) > 1e-3
    x = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, teacher), x)
    assert float(gradient.abs().max()) > 1e-5 and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("name", BY_NAME)
def test_the_order_of_a_batch_does_not_matter(name: str) -> None:
    loss, (student, teacher) = BY_NAME[name]
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(5))
    if name == "dkd":
        permuted = losses.decoupled_kd(student[order], teacher[order], torch.tensor(CLASSES)[order], 3.0, 0.7, 5.0)
    else:
        permuted = loss(student[order], teacher[order])
    torch.testing.assert_close(permuted, loss(student, teacher))


@pytest.mark.parametrize("name", BY_NAME)
def test_extreme_outputs_have_finite_losses_and_gradients(name: str) -> None:
    """Constant rows, images at the same place, and logits of which one probability underflows."""
    loss, (student, teacher) = BY_NAME[name]
    for x, y in ((torch.zeros_like(student), teacher), (torch.ones_like(student), torch.ones_like(teacher)), (student * 1e3, teacher)):
        x = x.float().requires_grad_()
        value = loss(x, y.float())
        (gradient,) = torch.autograd.grad(value, x)
        assert bool(torch.isfinite(value.detach())) and bool(torch.isfinite(gradient).all()), (value, gradient)


def test_decoupled_kd_with_the_teachers_own_weight_is_kd() -> None:
    student, teacher = LOGITS
    for index, c in enumerate(CLASSES):
        s, t = student[index : index + 1], teacher[index : index + 1]
        rest = 1 - float((t / 3).softmax(1)[0, c])
        torch.testing.assert_close(losses.decoupled_kd(s, t, torch.tensor([c]), 3.0, 1.0, rest), losses.kd(s, t, 3.0))


def test_standardised_logits_have_no_shift_and_no_scale() -> None:
    student, teacher = LOGITS
    expected = standardised_kd(student, teacher)
    shifts, scales = random(6, 1, seed=7), random(6, 1, seed=8).exp()
    torch.testing.assert_close(standardised_kd(scales * student + shifts, teacher), expected)
    torch.testing.assert_close(standardised_kd(student, scales * teacher + shifts), expected)
    assert float((losses.kd(3 * student, teacher, 2.0) - losses.kd(student, teacher, 2.0)).abs()) > 0.1  # unlike kd


def test_dist_compares_relations_of_probabilities() -> None:
    """Shifted logits have the same probabilities, and correlations see neither the shift nor the scale of a row or a column."""
    student, teacher = LOGITS
    torch.testing.assert_close(losses.dist(student + random(6, 1), teacher, 2.0), losses.dist(student, teacher, 2.0))
    p, q = student.softmax(1), teacher.softmax(1)
    scales, shifts = random(6, 1, seed=7).exp(), random(6, 1, seed=8)
    torch.testing.assert_close(losses.pearson(scales * p + shifts, q), losses.pearson(p, q))
    torch.testing.assert_close(losses.pearson(scales * p + shifts, p), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(losses.pearson(-p, p), -torch.ones(6, dtype=torch.float64))


def test_relations_have_no_scale_no_shift_and_no_rotation() -> None:
    student, teacher = EMBEDDINGS
    rotation = torch.linalg.qr(random(4, 4, seed=3))[0]
    for loss in (losses.relational_distance, losses.relational_angle):
        expected = loss(student, teacher)
        torch.testing.assert_close(loss(7 * student @ rotation + 2, teacher), expected)
        torch.testing.assert_close(loss(student, 0.1 * teacher - 1), expected)
        for n in (1, 2):
            assert float(loss(student[:n], teacher[:n])) == 0


def test_contrast_is_its_formula() -> None:
    positive, negative = SIMILARITIES
    normaliser = 37.0
    expected = slow.contrast(positive.numpy(), negative.numpy(), normaliser, 50)
    value = losses.contrast(positive, negative, torch.tensor(math.log(normaliser), dtype=torch.float64), 50)
    assert float(value) == pytest.approx(expected, rel=1e-12)
    log_normaliser = torch.tensor(1.0, dtype=torch.float64)
    inputs = (positive.clone().requires_grad_(), negative.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda p, n: losses.contrast(p, n, log_normaliser, 50), inputs)
    # A similar positive and dissimilar negatives lower it.
    assert float(losses.contrast(positive + 1, negative - 1, log_normaliser, 50)) < float(
        losses.contrast(positive, negative, log_normaliser, 50)
    )


def test_the_partial_distance_ignores_units_that_are_off_in_both() -> None:
    teacher, margin = torch.tensor([[[[-0.5]], [[-3.0]], [[2.0]]]]), torch.tensor([-1.0, -1.0, -1.0])
    student = torch.tensor([[[[-0.8]], [[-9.0]], [[2.0]]]])
    assert float(losses.partial_distance(student, teacher, margin)) == 0
    assert float(losses.partial_distance(student + 1, teacher, margin)) == pytest.approx(0.7**2 + 0 + 1**2)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 7), (16, 9)])
def test_context_of_odd_and_small_features(shape: tuple[int, int]) -> None:
    student, teacher = random(2, 3, *shape), random(2, 3, *shape, seed=1)
    assert float(losses.hierarchical_context(student, teacher)) > 0
    difference = torch.full_like(student, 2.0)
    torch.testing.assert_close(losses.hierarchical_context(student, student + difference), torch.tensor(4.0, dtype=torch.float64))
    assert np.isclose(float(losses.hierarchical_context(student, student)), 0)
