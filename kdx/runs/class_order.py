"""Recognises that labels and logits number the classes differently: another order of the classes gives a much higher accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

_LEAST_IMAGES = 30
"""With fewer images, the best order of the classes reaches a high accuracy by chance."""


def class_order_warning(labels: NDArray[np.int64], predictions: Mapping[str, NDArray[np.int64]], classes: Sequence[str]) -> str | None:
    """A warning for the terminal if one of the networks agrees with the labels only after its classes are matched anew, else None.

    labels, predictions [n]: indices of classes, by role. For each network the matching of its predicted classes to the labels is found
    that maximises the accuracy. The order counts as wrong if this accuracy is at least 0.6 and at least three times the accuracy in the
    stated order. It then gains at least 0.4, far more than matching gains by chance for _LEAST_IMAGES images and at least five per class.
    """
    count = len(np.unique(labels))
    if len(labels) < max(_LEAST_IMAGES, 5 * count):
        return None
    for role, predicted in predictions.items():
        accuracy = float((predicted == labels).mean())
        table = np.zeros((len(classes), 1 + max(len(classes) - 1, int(predicted.max()))), dtype=np.int64)
        np.add.at(table, (labels, predicted), 1)
        rows, columns = linear_sum_assignment(table, maximize=True)
        matched = float(table[rows, columns].sum() / len(labels))
        if matched < 0.6 or matched < 3 * accuracy:
            continue
        row, column = max(zip(rows, columns, strict=True), key=lambda pair: (pair[0] != pair[1], table[pair]))
        name = f"{classes[column]!r}" if column < len(classes) else f"number {column}"
        return (
            f"Warning: The order of the classes seems to be wrong: the {role} is right on {accuracy:.0%} of the images, and would be on "
            f"{matched:.0%} in another order. It predicts {name} for most images of {classes[row]!r}. Name the classes in the order of the "
            "logits in the models file (classes = [...])."
        )
    return None
