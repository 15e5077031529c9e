"""Splits, random batches and class-balanced samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdx.data.dataset import Dataset, Indices
from kdx.errors import KdxError
from kdx.features.arrays import MIN_IMAGES, batches_of, check_batch_size


def split(dataset: Dataset, seed: int) -> dict[str, Indices]:
    """Sorted, disjoint indices under train, validation and test.

    What the data prescribes is kept; a validation or test split that it lacks is taken, stratified, from its train split. With nothing
    prescribed: 60 % train, 15 % validation, 25 % test, stratified. The same seed gives the same split.
    """
    generator = np.random.default_rng(seed)
    rest = dataset.splits.get("train", np.arange(len(dataset), dtype=np.int64))
    parts = {name: dataset.splits[name] for name in ("test", "validation") if name in dataset.splits}
    for name, share in (("test", 0.25), ("validation", 0.2 if "test" not in parts else 0.15)):
        if name not in parts:
            parts[name], rest = _carve(dataset.labels, rest, share, generator)
    return {"train": np.sort(rest), "validation": np.sort(parts["validation"]), "test": np.sort(parts["test"])}


def _carve(labels: Indices, indices: Indices, share: float, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """A stratified share of ``indices``, and the others."""
    taken = []
    for label in np.unique(labels[indices]):
        members = generator.permutation(indices[labels[indices] == label])
        taken.append(members[: round(share * len(members))])
    part = np.concatenate(taken)
    return part, np.setdiff1d(indices, part)


def random_batches(labels: NDArray[np.integer], size: int, seed: int) -> list[Indices]:
    """Every position of ``labels`` [N] in exactly one batch, at random, so that scores pooled over batches estimate the whole set's.

    Batches with even classes would not: they hold fewer pairs of one class than the set, and scores with the target come out low.
    Only a batch without two images of one class beside two of others, which has no target geometry, is repaired by swapping an image.
    ceil(N / size) batches, fewer where they would hold under four images; their sizes differ by one at most. No batch holds
    more than max(size, 7). KdxError for fewer than four images, for one class, for a size under four, and where no swap helps.
    """
    labels = np.asarray(labels)
    check_batch_size(size)
    if len(labels) < MIN_IMAGES:
        raise KdxError(f"{len(labels)} images are too few for pairwise geometry.", "Give 4 images or more; scores are steady from 32 up.")
    if len(np.unique(labels)) < 2:
        raise KdxError("All the images are of one class, and relevance compares classes.", "Give images of two classes or more.")
    batches = batches_of(np.random.default_rng(seed).permutation(len(labels)).astype(np.int64), size)
    for batch in batches:
        if not _repair(batch, batches, labels):
            raise KdxError(
                f"Batches of {len(batch)} of these {len(labels)} images do not all hold two images of one class and two of others.",
                "Give a larger --batch, or more images a class.",
            )
    return [np.sort(batch) for batch in batches]


def _lacking(labels: NDArray[np.integer]) -> int:
    """Images to exchange until labels have a geometry: two of one class beside two of others. Centring takes one image apart from all
    others, or all apart from all, for nothing."""
    most = int(np.unique(labels, return_counts=True)[1].max())
    return 1 if most == 1 else max(0, 2 - (len(labels) - most))


def _repair(batch: Indices, batches: Sequence[Indices], labels: NDArray[np.integer]) -> bool:
    """Exchange images of ``batch`` with some of other batches, in place, until it has a geometry; whether it could be done."""
    return all(_exchange(batch, batches, labels) for _ in range(_lacking(labels[batch])))


def _exchange(batch: Indices, batches: Sequence[Indices], labels: NDArray[np.integer]) -> bool:
    """One image, so that ``batch`` lacks fewer and the other batch no more; whether there is one."""
    for other in batches:
        if other is batch:
            continue
        before = _lacking(labels[batch]), _lacking(labels[other])
        for i, j in itertools.product(range(len(batch)), range(len(other))):
            batch[i], other[j] = other[j], batch[i]
            if _lacking(labels[batch]) < before[0] and _lacking(labels[other]) <= before[1]:
                return True
            batch[i], other[j] = other[j], batch[i]
    return False


def _shuffled_by_class(labels: NDArray[np.integer], seed: int) -> Indices:
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.unique(labels))  # so that no class is always first to be dealt one more
    return np.concatenate([generator.permutation(np.flatnonzero(labels == label)) for label in classes]).astype(np.int64)


def class_balanced_sample(labels: NDArray[np.integer], count: int, seed: int) -> Indices:
    """``count`` sorted positions of ``labels`` [N] with the classes as even as they can be; all N where ``count`` is more.

    A class with fewer images than its share gives all it has, and the others make up for it.
    """
    labels = np.asarray(labels)
    if count < 1:
        raise ValueError("count is 1 or more")
    order = _shuffled_by_class(labels, seed)
    # The round of an image is how many of its class were drawn before it: whole rounds are balanced.
    turns = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels[order] == label)
        turns[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turns, kind="stable")[:count]])
