"""Random batches, each with the target geometry that scores need."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdx.data.dataset import Indices
from kdx.errors import KdxError
from kdx.features.arrays import batches_of, check_batch_size, check_images


def random_batches(labels: NDArray[np.integer], size: int, seed: int) -> list[Indices]:
    """Batches that contain every position of ``labels`` [N] exactly once, at random, so that scores pooled over batches estimate those
    of the whole set.

    Class-balanced batches would not do that: they contain fewer pairs of equal class than the set, and scores with the target would be
    too low. Only a batch that does not contain two images of one class and two of other classes, and so has no target geometry, is
    changed: images are swapped with other batches. There are ceil(N / size) batches, or fewer if they would contain fewer than four
    images. Their sizes differ by at most one, and no batch contains more than max(size, 7) images.

    Raises KdxError for fewer than four images, for a single class, for a size below four, and if no swap helps.
    """
    labels = np.asarray(labels)
    check_batch_size(size)
    check_images(len(labels))
    check_labels(labels)
    batches = batches_of(np.random.default_rng(seed).permutation(len(labels)).astype(np.int64), size)
    for batch in batches:
        if not _swap_until_valid(batch, batches, labels):
            raise KdxError(
                f"Not every batch of {len(batch)} of these {len(labels)} images can contain two images of one class and two of others.",
                "Give a larger --batch, or more images per class.",
            )
    return [np.sort(batch) for batch in batches]


def check_labels(labels: NDArray[np.integer]) -> None:
    """Raise KdxError if labels [N] have no geometry: they need two images of one class and two of other classes."""
    if len(np.unique(labels)) < 2:
        raise KdxError("All images have the same class, and relevance compares classes.", "Give images of two classes or more.")
    if swaps_needed(labels):
        raise KdxError(
            f"The classes of these {len(labels)} images have no geometry: each image has its own class, or all except one share a class.",
            "Give images with at least two of one class and two of other classes.",
        )


def swaps_needed(labels: NDArray[np.integer]) -> int:
    """The number of images to swap until a batch has target geometry: two images of one class and two of other classes.

    Otherwise the U-centred matrix of the target is zero: if all images have one class, if only one image differs, or if
    all differ from each other.
    """
    most = int(np.unique(labels, return_counts=True)[1].max())
    return 1 if most == 1 else max(0, 2 - (len(labels) - most))


def _swap_until_valid(batch: Indices, batches: Sequence[Indices], labels: NDArray[np.integer]) -> bool:
    """Swap images of ``batch`` with other batches, in place, until it has target geometry. Returns False if that is impossible."""
    return all(_swap_one(batch, batches, labels) for _ in range(swaps_needed(labels[batch])))


def _swap_one(batch: Indices, batches: Sequence[Indices], labels: NDArray[np.integer]) -> bool:
    """Swap one image so that ``batch`` needs fewer swaps and the other batch no more than before. Returns False if there is none."""
    for other in batches:
        if other is batch:
            continue
        before = swaps_needed(labels[batch]), swaps_needed(labels[other])
        for i, j in itertools.product(range(len(batch)), range(len(other))):
            batch[i], other[j] = other[j], batch[i]
            if swaps_needed(labels[batch]) < before[0] and swaps_needed(labels[other]) <= before[1]:
                return True
            batch[i], other[j] = other[j], batch[i]
    return False
