"""Data references: which data set a reference names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdx.data.labelled_images import SPLITS, Dataset, Indices
from kdx.data.sample import SAMPLE, sample_of, sample_parts
from kdx.data.sources import SOURCES, Source
from kdx.data.sources.image_files import open_folder
from kdx.errors import KdxError
from kdx.remote import as_path, without_credentials

__all__ = ["SPLITS", "Dataset", "Indices", "located", "open_data", "source_of", "table_of"]


def open_data(reference: str, classes: Sequence[str] | None = None, *, labelled: bool = True) -> Dataset:
    """The data set that a reference names: ``SOURCE:PLACE``, ``digits``, ``composites``, or a path.

    `kdx.choices.DATA_REFERENCES` lists the references, and `kdx.data.sources` has a module for each source. The path of a ``.csv`` or
    ``.npz`` file needs no source, and any other path is a folder of images. With ``classes``, labels index these classes, of which the
    data may contain only some. labelled: False where classes do not matter. A single class, a folder of images without class folders and
    classes that are not in ``classes`` are then accepted; with other classes the labels index those of the data.

    A folder or a table may be at a URL, such as ``s3://bucket/photos``. Credentials in a URL are removed and not used.

    Raises KdxError for data that are missing or damaged, for a single class, and for a class that is not in ``classes``.
    """
    reference = without_credentials(reference)
    source, place = _parsed(reference)
    dataset = _SOURCES[source].open(reference, place) if labelled or source != "folder" else open_folder(reference, place, labelled=False)
    if not labelled and not set(dataset.classes) <= set(classes or ()):
        return dataset
    if labelled and len(dataset.classes) < 2:
        raise KdxError(
            f"{reference} has only one class, {dataset.classes[0]!r}.", "Relevance compares classes: give images of two classes or more."
        )
    return dataset if classes is None else _relabelled(dataset, tuple(classes))


def located(reference: str) -> str:
    """The data reference with the absolute path of its folder or file, without symbolic links. Equal data sets that are written in
    different ways, such as ``folder:photos`` and ``./photos/``, have the same located reference. A relative path starts at the current
    folder."""
    source, place = _parsed(without_credentials(reference))
    absolute = _SOURCES[source].locate(place)
    if not absolute:
        return source
    return absolute if _parsed(absolute) == (source, absolute) else f"{source}:{absolute}"


def source_of(reference: str) -> str:
    """The name of the source of a data reference (`kdx.data.sources.SOURCES`); ``folder`` for any other path, such as that of an image."""
    return _parsed(reference)[0]


def table_of(reference: str) -> Path | None:
    """The CSV file that lists the images of a data reference; None for another kind of data."""
    source, place = _parsed(reference)
    if source == SAMPLE:
        return table_of(sample_parts(reference, place)[1])
    return as_path(place).expanduser() if source == "csv" else None


def _parsed(reference: str) -> tuple[str, str]:
    """The source of a reference, and what follows it: a folder, a file, or a name."""
    source, _, place = reference.partition(":")
    if source in _SOURCES and _SOURCES[source].accepts(reference):
        return source, place
    suffix = Path(reference).suffix.lower()
    if suffix in (".csv", ".npz") and not Path(reference).expanduser().is_dir():
        return suffix[1:], reference
    return "folder", reference


def _relabelled(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    for name in dataset.classes:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3) or classes[:5]
            raise KdxError(
                f"The data has a class {name!r} that the models do not have.",
                f"Rename or remove its folder; near matches: {', '.join(near)}.",
            )
    labels = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)[dataset.labels]
    return replace(dataset, classes=classes, labels=labels, relabelled_from=dataset)


def _open_sample(reference: str, place: str) -> Dataset:
    count, sampled = sample_parts(reference, place)
    return sample_of(open_data(sampled), count, reference)


def _locate_sample(place: str) -> str:
    count, sampled = sample_parts(f"{SAMPLE}:{place}", place)
    return f"{count}:{located(sampled)}"


_SOURCES = {**SOURCES, SAMPLE: Source(_open_sample, _locate_sample)}
"""A sample names another data set, so it is opened here and not in `kdx.data.sources`."""
