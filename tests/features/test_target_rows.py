"""Targets from a network against loops over images, and the property that two classes have one geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import kdx
from kdx.errors import KdxError
from kdx.features import prototypes, soft_labels
from kdx.features.target_rows import class_means

RNG = np.random.default_rng(0)
LABELS = np.array([2, 0, 0, 2, 1, 1, 2, 0, 1, 2, 2])
MAPS = RNG.normal(size=(len(LABELS), 5, 2, 3))


def mean_of_others(rows: NDArray[np.float64], place: int) -> list[float]:
    others = [row for j, row in enumerate(rows) if j != place and LABELS[j] == LABELS[place]]
    return [sum(column) / len(others) for column in zip(*others, strict=True)]


def test_prototypes_are_the_means_of_the_other_images_of_a_class() -> None:
    pooled = MAPS.mean((2, 3))
    expected = np.stack([mean_of_others(pooled, place) for place in range(len(LABELS))])
    for features in (MAPS, pooled):
        assert np.allclose(prototypes(features, LABELS), expected, rtol=0, atol=1e-14)
    tensor = prototypes(torch.from_numpy(MAPS), torch.from_numpy(LABELS))
    assert isinstance(tensor, torch.Tensor) and np.allclose(tensor, expected)


def test_images_outside_of_those_averaged_have_the_plain_mean() -> None:
    rows, labels = torch.from_numpy(MAPS.mean((2, 3))), torch.from_numpy(LABELS)
    means = class_means(torch.tensor([1, 2]), rows, labels, torch.tensor([-1, 3]))
    assert torch.allclose(means[0], rows[labels == 1].mean(0))
    assert torch.allclose(means[1], rows[[0, 6, 9, 10]].mean(0))


def test_a_class_without_another_image_has_no_mean() -> None:
    with pytest.raises(KdxError, match=r"Class number 5 has no image"):
        prototypes(MAPS[:4], [0, 0, 5, 0])
    with pytest.raises(KdxError, match="labels"):
        prototypes(MAPS, LABELS[:5])


def test_soft_labels_are_the_softmax_at_the_temperature() -> None:
    logits = 30 * RNG.normal(size=(7, 4)).astype(np.float32)
    powers = np.exp(logits.astype(np.float64) / 2.5)
    assert np.allclose(soft_labels(logits, 2.5), powers / powers.sum(1, keepdims=True), rtol=1e-12)
    with pytest.raises(ValueError, match="positive"):
        soft_labels(logits, 0.0)


def test_two_classes_have_one_geometry_whatever_their_embeddings() -> None:
    """RS does not depend on the embeddings of two classes, and does depend on those of three."""
    features = RNG.normal(size=(40, 30))
    two, three = np.arange(40) % 2, np.arange(40) % 3
    embeddings = [scale * RNG.normal(size=(3, width)) for scale, width in ((1, 1), (1e-3, 4), (1e4, 50))]
    of_two = [kdx.rs(features, rows[two]).value for rows in embeddings]
    assert np.ptp([*of_two, kdx.rs(features, two).value]) < 1e-12
    partial = [kdx.rs(features, rows[two], features[:, :9]).value for rows in embeddings]
    assert np.ptp(partial) < 1e-12
    assert np.ptp([kdx.rs(features, rows[three]).value for rows in embeddings]) > 1e-3
