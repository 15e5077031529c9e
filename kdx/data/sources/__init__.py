"""The sources of data sets: a module for each kind of reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdx.data.labelled_images import Dataset
from kdx.data.sources import arrays, cifar, digits, hugging_face, image_files, sample


def _absolute(place: str) -> str:
    return str(Path(place).expanduser().resolve())


@dataclass(frozen=True)
class Source:
    """How a kind of data reference is opened.

    open: the data set of a reference and of what follows ``SOURCE:`` in it. locate: the latter with an absolute path.
    """

    open: Callable[[str, str], Dataset]
    locate: Callable[[str], str] = _absolute


SOURCES = {
    "folder": Source(image_files.open_folder),
    "csv": Source(image_files.open_table),
    "npz": Source(arrays.open_npz),
    "cifar10": Source(cifar.open_cifar10),
    "cifar100": Source(cifar.open_cifar100),
    "hfdata": Source(hugging_face.open_hugging_face, hugging_face.locate),
    "digits": Source(digits.open_digits, str),
    "sample": Source(sample.open_sample, sample.locate),
}
"""The sources by the name that begins a reference. `kdx.choices.DATA_REFERENCES` describes the references."""
