"""The conclusion about methods follows from their intervals."""

from __future__ import annotations

import pytest

from benchmarks import methods

BASE = [0.5, 0.6, 0.7]


def test_a_method_helps_if_its_whole_interval_is_above_the_base() -> None:
    differences = {"kd": (0.1, 0.11, 0.12), "dist": (0.1, -0.1, 0.2), "at": (-0.2, -0.21, -0.2), methods.WITH_ASSISTANT: (0.05, 0.05, 0.06)}
    record = {"accuracies": {"teacher": BASE, "base": BASE} | {
        name: [base + gain for base, gain in zip(BASE, gains, strict=True)] for name, gains in differences.items()
    }}  # fmt: skip
    mean, half = methods.gain(record, "kd")
    assert (mean, half) == pytest.approx((0.11, 4.303 * 0.01 / 3**0.5))  # the standard deviation is 0.01
    assert methods.conclusion(record) == (
        "Here `kd` and kd with an assistant help. Here `at` harms. Here `dist` makes no difference that these seeds show."
    )
