"""Splits of a data set, and class-balanced samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdx.data.labelled_images import Dataset, Indices


def validation_is_test(dataset: Dataset) -> bool:
    """Whether the data define the splits train and validation but not test. Their validation images are then the test split."""
    return set(dataset.splits) == {"train", "validation"}


def stratified_splits(dataset: Dataset, seed: int, *, rule_of_0_1_0: bool = False) -> dict[str, Indices]:
    """Sorted, disjoint indices of the splits train, validation and test, which together contain every image.

    The splits that the data define are kept. If they define none, the splits are stratified, with 60 % train, 15 % validation and 25 %
    test. A missing validation split is a stratified sample of 15 % of train. If the data define train and validation but not test, their
    validation images are the test split, because no weights should be chosen by the images that are explained. The same seed gives the
    same splits.

    rule_of_0_1_0: a missing test split is a stratified sample of 25 % of train, even if the data define validation.
    """
    generator = np.random.default_rng(seed)
    rest = dataset.splits.get("train", np.arange(len(dataset), dtype=np.int64))
    splits = {name: dataset.splits[name] for name in ("test", "validation") if name in dataset.splits}
    if validation_is_test(dataset) and not rule_of_0_1_0:
        splits["test"] = splits.pop("validation")
    for name, share in (("test", 0.25), ("validation", 0.2 if "test" not in splits else 0.15)):
        if name not in splits:
            splits[name], rest = _stratified_sample(dataset.labels, rest, share, generator)
    return {"train": np.sort(rest), "validation": np.sort(splits["validation"]), "test": np.sort(splits["test"])}


def _stratified_sample(labels: Indices, indices: Indices, share: float, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """A stratified share of ``indices``, and the remaining ones."""
    samples = []
    for label in np.unique(labels[indices]):
        members = generator.permutation(indices[labels[indices] == label])
        samples.append(members[: round(share * len(members))])
    sample = np.concatenate(samples)
    return sample, np.sort(indices[~np.isin(indices, sample, kind="table")])


def _shuffled_by_class(labels: NDArray[np.integer], seed: int) -> Indices:
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.unique(labels))  # so that no class is always the first to get an extra image
    return np.concatenate([generator.permutation(np.flatnonzero(labels == label)) for label in classes]).astype(np.int64)


def class_balanced_sample(labels: NDArray[np.integer], count: int, seed: int) -> Indices:
    """``count`` sorted positions of ``labels`` [N] with class counts as even as possible; all N if ``count`` is larger.

    If a class has fewer images than its share, all its images are in the sample and the other classes fill the rest.
    Raises ValueError for a count below 1.
    """
    labels = np.asarray(labels)
    if count < 1:
        raise ValueError("count must be 1 or more")
    order = _shuffled_by_class(labels, seed)
    # The round of an image is the number of images of its class before it. Complete rounds are balanced.
    rounds = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels[order] == label)
        rounds[members] = np.arange(len(members))
    return np.sort(order[np.argsort(rounds, kind="stable")[:count]])
