"""Reference mode: a map depends on its image and the reference images alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kdx
from kdx import KdxError
from kdx.explain.results import Explanation
from tests.explain.small_networks import EXPLAINED, LAYERS, N, close, explainer, features, images, labels


def test_a_referenced_map_is_the_images_own(explained: Explanation[Any]) -> None:
    """In any batch, an image's map is the last row of a plain unicam of the references and this image."""
    references, reference_labels = images(10, seed=5), torch.arange(10) % 4
    with explainer() as opened:
        opened.use_references(references, reference_labels)
        actual = opened(images(), labels())
        fewer = opened(images()[3:9], labels()[3:9])
    role_features = features(torch.cat([references, images()]))
    for layer in LAYERS:
        for name, (one, other) in EXPLAINED.items():
            maps, weights = getattr(actual.layers[layer], name).maps, getattr(actual.layers[layer], name).weights
            close(getattr(fewer.layers[layer], name).maps, maps[3:9], 1e-5)
            scores = []
            for image in range(N):
                rows = [*range(10), 10 + image]
                alone = kdx.unicam(
                    role_features[one][layer][rows],
                    role_features[other][layer][rows],
                    torch.cat([reference_labels, labels()[image : image + 1]]),
                )
                close(maps[image], alone.maps[-1], 1e-3)
                close(weights[image], alone.weights[-1], 1e-3)
                scores.append(alone.score)
            assert getattr(actual.layers[layer], name).score == pytest.approx(np.mean(scores), abs=1e-5)
        for name, score in actual.layers[layer].scores.items():  # scores stay the batch's
            assert score.value == pytest.approx(explained.layers[layer].scores[name].value, abs=1e-9)


def test_a_label_that_no_reference_has_is_a_class_of_its_own() -> None:
    with explainer() as opened:
        opened.use_references(images(10, seed=5), torch.arange(10) % 2)
        actual, other = (opened(images(), labels() + shift).layers["conv2"].distilled for shift in (7, 70))
        same_class = opened(images(), labels() % 2).layers["conv2"].distilled
    close(actual.maps, other.maps, 1e-6)
    assert not torch.allclose(actual.maps, same_class.maps)


@pytest.mark.parametrize("n", [9, 11])
def test_references_without_one_label_per_image_are_refused(n: int) -> None:
    with explainer() as opened, pytest.raises(KdxError, match=f"{n} rows of reference labels and 10 of reference images"):
        opened.use_references(images(10), labels(n))


def test_references_of_one_class_are_refused() -> None:
    with explainer() as opened, pytest.raises(KdxError, match="one class"):
        opened.use_references(images(10), torch.zeros(10, dtype=torch.int64))
