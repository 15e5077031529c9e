"""A part of another data set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kdx.data.labelled_images import Dataset
from kdx.data.splits import class_balanced_sample
from kdx.errors import KdxError

SAMPLE = "sample"
"""What the reference of a sample begins with: ``sample:N:REFERENCE``."""

_SEED = 0


def sample_parts(reference: str, place: str) -> tuple[int, str]:
    """The number of images and the reference of the data set of ``place``, which is ``N:REFERENCE``. Raises KdxError for anything else."""
    count, colon, sampled = place.partition(":")
    if not (count.isdecimal() and int(count) and colon and sampled):
        raise KdxError(f"{reference!r} is not a sample.", "Write sample:N:REFERENCE, such as sample:500:digits.")
    return int(count), sampled


def sample_of(dataset: Dataset, count: int, reference: str) -> Dataset:
    """``count`` images of a data set, under their own reference; the whole data set if it has fewer.

    Class counts are as even as possible. Each split that the data define keeps its share of the images, at least one. The images are the
    same in every sample of this size.
    """
    splits = dataset.splits or {"": np.arange(len(dataset), dtype=np.int64)}
    total = sum(map(len, splits.values()))
    parts = [
        indices[class_balanced_sample(dataset.labels[indices], max(1, round(count * len(indices) / total)), _SEED)]
        for indices in splits.values()
    ]
    kept = np.sort(np.concatenate(parts))
    ids = tuple(dataset.ids[index] for index in kept)
    files = {name: dataset.files[name] for name in ids} if dataset.has_file_per_image else dataset.files
    return replace(
        dataset,
        reference=reference,
        labels=dataset.labels[kept],
        ids=ids,
        files=files,
        reader=lambda index: dataset.reader(int(kept[index])),
        splits={name: np.searchsorted(kept, np.sort(part)) for name, part in zip(dataset.splits, parts, strict=False)},
    )
