"""Weights that kdx trained before and that a distillation uses: whether their training has seen the test images of its split."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdx.data.dataset import Dataset, Indices
from kdx.data.splits import stratified_splits
from kdx.distill.checkpoints import TrainingData, read_training_data
from kdx.errors import KdxError
from kdx.models.weights import split_key


def check_weights(role: str, weights: str, dataset: Dataset, splits: Mapping[str, Indices]) -> tuple[TrainingData | None, str | None]:
    """The data that existing weights were trained on, and a warning where these cannot be compared with ``splits`` of ``dataset``.

    Both are None for weights that kdx did not train. Raises KdxError if images of the test split were in the training or validation
    split of these weights, which were then trained with another split seed.
    """
    data = read_training_data(split_key(weights)[0])
    if data is None:
        return None, None
    if data.fingerprint != (dataset.fingerprint_of_0_1_0 if data.of_0_1_0 else dataset.fingerprint):
        return data, (
            f"The {role}'s weights {weights} were trained on other data, or {dataset.reference} has changed since. Images of the test "
            "split may have been used in their training."
        )
    unseen = stratified_splits(dataset, data.split_seed, rule_of_0_1_0=data.of_0_1_0)["test"]
    seen = np.setdiff1d(splits["test"], unseen)
    if len(seen):
        same_split = stratified_splits(dataset, data.split_seed)["test"]
        first = "" if np.setdiff1d(same_split, unseen).size else f"--split-seed {data.split_seed} or "
        raise KdxError(
            f"The {role}'s weights {weights} were trained with split seed {data.split_seed}, and {len(seen)} of the {len(splits['test'])} "
            "test images of this split were used in their training.",
            f"To explain images that no network has seen, give {first}other weights for the {role}.",
        )
    return data, None
