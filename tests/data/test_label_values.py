"""Classes from the values of a column of any type."""

from __future__ import annotations

from typing import Any

import pytest

from kdx.data.label_values import class_labels
from kdx.errors import KdxError


@pytest.mark.parametrize(
    ("values", "names", "problem"),
    [
        ([["cat"], ["dog"]], None, "neither integers nor names"),
        ([{"name": "cat"}, {"name": "dog"}], ["cat", "dog"], "neither integers nor names"),
        ([0, [1]], ["cat", "dog"], "neither integers nor names"),
        ([0, 1], ["cat", ["dog"]], "different names"),
        ([0, 1], ["cat", "cat"], "different names"),
        ([0, None, 5], ["cat", "dog"], "2 of 3 images"),
    ],
)
def test_values_and_names_that_are_refused(values: list[Any], names: list[Any] | None, problem: str) -> None:
    with pytest.raises(KdxError, match=problem):
        class_labels(values, names, "The column 'label' of data", "data")


def test_names_and_numbers_of_classes() -> None:
    classes, labels = class_labels([1, "cat", 0], ["cat", "dog"], "label", "data")
    assert classes == ("cat", "dog") and labels.tolist() == [1, 0, 0]
    classes, labels = class_labels(["10", "9", 9], None, "label", "data")
    assert classes[labels[0]] == "10" and len(labels) == 3
