"""Targets that are computed from a network: class means of features, and softened logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import ArrayT


def prototypes(features: ArrayT, labels: Any) -> ArrayT:
    """The target rows [n, d] of n images by class means of features [n, d] or [n, C, H, W]: the mean over the other images of its class.

        row_i = (sum over j != i with y_j = y_i of x_j) / (n_y - 1),        x_j: the features, or their spatial means

    Each image is left out of its own row, since the row would otherwise contain the features that it is compared with. labels [n]:
    integers. The rows do not show how well the features separate the classes. Raises KdxError for a class with a single image.

    >>> import numpy as np
    >>> prototypes(np.array([[1.0], [3.0], [5.0], [7.0]]), [0, 0, 1, 1]).tolist()
    [[3.0], [1.0], [7.0], [5.0]]
    """
    values, classes = arrays.tensor(features, "features"), torch.as_tensor(labels)
    arrays.check_same(len(classes), len(values), "labels", "features")
    return arrays.like(class_means(classes, spatial_means(values), classes, torch.arange(len(values))), features)


def soft_labels(logits: ArrayT, temperature: float = 4.0) -> ArrayT:
    """The target rows softmax(logits / T) [n, classes], which the loss of Hinton et al. (2015) compares at the temperature T > 0.

    Images of one class have rows that differ, so relevance also measures relations within a class. Raises ValueError for T <= 0.

    >>> import numpy as np
    >>> soft_labels(np.array([[0.0, 4 * np.log(3)]]), temperature=4).round(3).tolist()
    [[0.25, 0.75]]
    """
    if temperature <= 0:
        raise ValueError(f"the temperature is positive, not {temperature}")
    return arrays.like((arrays.tensor(logits, "logits").double() / temperature).softmax(1), logits)


def spatial_means(features: Tensor) -> Tensor:
    """Features [n, d] or [n, C, H, W] as float64 rows [n, d] or [n, C]."""
    return features.double() if features.ndim == 2 else features.double().flatten(2).mean(2)


def class_means(labels: Tensor, rows: Tensor, row_labels: Tensor, places: Tensor) -> Tensor:
    """The mean of the rows [m, d] of each image's class [n, d], without the image's own row.

    labels [n]: the classes of the images. row_labels [m]: those of the rows. places [n]: the row of each image, or -1 where the rows do
    not contain it. Raises KdxError for an image whose class has no other row.
    """
    count = int(max(labels.max(), row_labels.max())) + 1
    sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, row_labels.to(rows.device), rows)
    labels, places = labels.to(rows.device), places.to(rows.device)
    inside = places >= 0
    numbers = torch.bincount(row_labels, minlength=count).to(rows.device)[labels] - inside.long()
    if bool((numbers < 1).any()):
        label = int(labels[numbers < 1][0])
        raise KdxError(
            f"Class number {label} has no image from which a mean can be computed.",
            "Give classes with several images, or another target: an image is left out of its own class mean.",
        )
    own = torch.where(inside[:, None], rows[places.clamp(min=0)], torch.zeros((), dtype=rows.dtype, device=rows.device))
    return (sums[labels] - own) / numbers[:, None]
