"""Distillation losses against slow float64 formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdx.distill import Batch, Objective, Outputs, Shapes, TrainingSettings, attention_transfer, kd

Array = NDArray[np.float64]


def slow_kd(student: Array, teacher: Array, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student / temperature, teacher / temperature, strict=True):
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        total += float((p * np.log(p / q)).sum())
    return temperature**2 * total / len(student)


def slow_attention(features: Array) -> Array:
    maps = []
    for image in features:
        attention = sum((channel**2 for channel in image), np.zeros(image.shape[1:])) / len(image)
        maps.append(attention.ravel() / np.sqrt((attention**2).sum()))
    return np.array(maps)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_is_its_formula(temperature: float) -> None:
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(5, 7)), 3 * generator.normal(size=(5, 7))
    value = kd(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert float(value) == pytest.approx(slow_kd(student, teacher, temperature), rel=1e-12)


def test_kd_has_no_gradient_where_teacher_and_student_agree() -> None:
    teacher = torch.randn(6, 4, dtype=torch.float64)
    student = (teacher + 3).requires_grad_()  # softmax does not see the shift
    value = kd(student, teacher, 4.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(float(value.detach())) < 1e-12 and float(gradient.abs().max()) < 1e-12
    assert float(kd(torch.randn(6, 4), torch.randn(6, 4), 4.0)) > 0
    assert torch.isfinite(kd(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]), 1.0))


def test_attention_transfer_is_its_formula() -> None:
    generator = np.random.default_rng(0)
    shapes = [((3, 4, 5, 7), (3, 6, 5, 7)), ((3, 2, 3, 3), (3, 9, 3, 3))]
    pairs = [
        (generator.normal(size=student).astype(np.float32), generator.normal(size=teacher).astype(np.float32))
        for student, teacher in shapes
    ]
    value = attention_transfer([torch.from_numpy(s) for s, _ in pairs], [torch.from_numpy(t) for _, t in pairs])
    expected = sum(float(((slow_attention(s.astype(np.float64)) - slow_attention(t.astype(np.float64))) ** 2).mean()) for s, t in pairs)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_attention_ignores_scale_channels_and_resolution() -> None:
    features = torch.rand(4, 6, 8, 8)
    assert float(attention_transfer([features * 50], [features])) < 1e-12
    assert float(attention_transfer([torch.cat([features, features], 1)], [features.flip(1)])) < 1e-12
    coarse = torch.full((4, 6, 4, 4), 2.0)
    assert float(attention_transfer([coarse], [torch.full((4, 3, 9, 9), 0.5)])) < 1e-12
    assert float(attention_transfer([features], [features.flip(3)])) > 1e-5
    with pytest.raises(ValueError):
        attention_transfer([features], [])


def test_methods_mix_hard_labels_in() -> None:
    torch.manual_seed(0)
    student, teacher = (Outputs(torch.randn(5, 3), (torch.randn(5, 2, 4, 4),)) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 2, 1])
    hard = torch.nn.functional.cross_entropy(student.logits, labels)
    settings = TrainingSettings(alpha=0.25, temperature=2.0, beta=10.0)
    soft = kd(student.logits, teacher.logits, 2.0)
    attention = attention_transfer(student.features, teacher.features)

    def loss(method: str, settings: TrainingSettings = settings) -> torch.Tensor:
        parts = Objective(method, Shapes(), settings)(Batch(student, teacher, labels))
        return torch.stack(list(parts.values())).sum()

    torch.testing.assert_close(loss("kd"), 0.75 * hard + 0.25 * soft)
    torch.testing.assert_close(loss("kd", replace(settings, alpha=0.0)), hard)
    torch.testing.assert_close(loss("at"), hard + 5 * attention)
    torch.testing.assert_close(loss("kd+at:0.5"), 0.75 * hard + 0.25 * soft + 2.5 * attention)
