"""Random batches: every image once, and target geometry in each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kdx.data.batches import random_batches, swaps_needed
from kdx.errors import KdxError
from kdx.kernels import geometry


@pytest.mark.parametrize("seed", range(8))
def test_batches_contain_every_image_once_and_each_has_target_geometry(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count, size = int(generator.integers(4, 200)), int(generator.integers(4, 40))
    labels = generator.choice(5, count, p=[0.6, 0.2, 0.1, 0.05, 0.05])
    labels[:2] = 0, 1
    batches = random_batches(labels, size, seed)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 4 and max(sizes) <= max(size, 7)
    assert all(1 < len(np.unique(labels[batch])) < len(batch) for batch in batches)
    assert all(np.array_equal(a, b) for a, b in zip(batches, random_batches(labels, size, seed), strict=True))


def test_every_batch_has_pairs_of_equal_and_of_different_classes() -> None:
    """With about as many classes as images in a batch, class-balanced batches would have no two images of one class."""
    for labels in (np.repeat(np.arange(100), 20), np.repeat(np.arange(200), 2), np.repeat([0, 1], [120, 30])):
        for batch in random_batches(labels, 12, 0):
            most = np.unique(labels[batch], return_counts=True)[1].max()
            assert 2 <= most <= len(batch) - 2


def test_no_swap_is_needed_exactly_if_the_u_centred_target_is_not_zero() -> None:
    """For every division of four to seven images into classes."""
    for n in range(4, 8):
        for labels in itertools.combinations_with_replacement(range(4), n):
            d = geometry.distances(torch.nn.functional.one_hot(torch.tensor(labels)).double())
            assert (swaps_needed(np.array(labels)) == 0) == (float(geometry.u_centered(d).abs().max()) > 1e-9), labels


def test_a_class_too_rare_for_batches_of_this_size_is_an_error() -> None:
    with pytest.raises(KdxError, match="larger --batch"):
        random_batches(np.repeat([0, 1], [97, 3]), 10, 0)


def test_batches_differ_between_seeds() -> None:
    labels = np.arange(64) % 4
    assert not np.array_equal(random_batches(labels, 16, 0)[0], random_batches(labels, 16, 1)[0])


@pytest.mark.parametrize(("labels", "size"), [([0, 1, 0], 4), ([2] * 9, 4), ([0, 1] * 5, 3), ([], 4)])
def test_batches_too_small_for_geometry_are_refused(labels: list[int], size: int) -> None:
    with pytest.raises(KdxError):
        random_batches(np.array(labels, dtype=np.int64), size, 0)
