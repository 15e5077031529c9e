"""The warning about a wrong order of the classes."""

from __future__ import annotations

import numpy as np
import pytest

from kdx.runs.class_order import class_order_warning

CLASSES = ("cat", "dog", "hen", "owl")
LABELS = np.arange(60) % 4


def predictions(order: list[int], errors: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """What a network predicts whose logits are in this order; the first images are wrong."""
    predicted = np.array(order)[LABELS]
    predicted[:errors] = np.roll(predicted, 1)[:errors]
    return predicted


def test_another_order_is_recognised_and_named() -> None:
    warning = class_order_warning(LABELS, {"base": predictions([1, 2, 0, 3], 3)}, CLASSES)
    assert warning is not None
    assert warning.startswith("Warning: The order of the classes seems to be wrong: the base is right on 2")
    assert "would be on 95% in another order" in warning
    assert (
        "'dog' for most images of 'cat'" in warning
        or "'hen' for most images of 'dog'" in warning
        or "'cat' for most images of 'hen'" in warning
    )


def test_logits_that_the_data_do_not_have_are_numbers() -> None:
    warning = class_order_warning(LABELS, {"student": LABELS + 281}, CLASSES)
    assert warning is not None and "It predicts number 28" in warning


@pytest.mark.parametrize("errors", [0, 20, 30])
def test_the_stated_order_is_not_doubted(errors: int) -> None:
    assert class_order_warning(LABELS, {"teacher": predictions([0, 1, 2, 3], errors)}, CLASSES) is None


def test_chance_is_not_doubted() -> None:
    """Networks that guess, with 2 to 10 classes and from few to many images."""
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 10):
        for n in (4, 20, 30, 100):
            for _ in range(50):
                labels, predicted = rng.integers(0, count, (2, n))
                assert class_order_warning(labels, {"base": predicted}, [str(index) for index in range(count)]) is None


def test_two_classes_the_wrong_way_round_are_recognised() -> None:
    labels = np.arange(40) % 2
    assert class_order_warning(labels, {"base": 1 - labels}, ("cat", "dog")) is not None
    assert class_order_warning(labels[:10], {"base": 1 - labels[:10]}, ("cat", "dog")) is None  # too few
