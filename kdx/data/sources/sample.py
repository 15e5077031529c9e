"""A part of another data set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kdx.data.labelled_images import Dataset
from kdx.data.splits import class_balanced_sample
from kdx.errors import KdxError

_SEED = 0


def open_sample(reference: str, place: str) -> Dataset:
    """N images of the data set in ``place``, which is ``N:REFERENCE``; the whole data set if it has fewer.

    Class counts are as even as possible. Each split that the data define keeps its share of the images, at least one. The images are the
    same in every sample of this size.
    """
    from kdx.data.dataset import open_data  # which imports the sources

    count, sampled = _parts(reference, place)
    return _sample(open_data(sampled), count, reference)


def locate(place: str) -> str:
    """``N:REFERENCE`` with the absolute path of the data set's folder or file."""
    from kdx.data.dataset import located

    count, sampled = _parts(f"sample:{place}", place)
    return f"{count}:{located(sampled)}"


def _parts(reference: str, place: str) -> tuple[int, str]:
    count, colon, sampled = place.partition(":")
    if not (count.isdecimal() and int(count) and colon and sampled):
        raise KdxError(f"{reference!r} is not a sample.", "Write sample:N:REFERENCE, such as sample:500:digits.")
    return int(count), sampled


def _sample(dataset: Dataset, count: int, reference: str) -> Dataset:
    splits = dataset.splits or {"": np.arange(len(dataset), dtype=np.int64)}
    total = sum(map(len, splits.values()))
    parts = [
        indices[class_balanced_sample(dataset.labels[indices], max(1, round(count * len(indices) / total)), _SEED)]
        for indices in splits.values()
    ]
    kept = np.sort(np.concatenate(parts))
    ids = tuple(dataset.ids[index] for index in kept)
    files = {name: dataset.files[name] for name in ids} if tuple(dataset.files) == dataset.ids else dataset.files
    return replace(
        dataset,
        reference=reference,
        labels=dataset.labels[kept],
        ids=ids,
        files=files,
        reader=lambda index: dataset.reader(int(kept[index])),
        splits={name: np.searchsorted(kept, np.sort(part)) for name, part in zip(dataset.splits, parts, strict=False)},
    )
