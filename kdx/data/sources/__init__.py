"""The sources of data sets: a module for each kind of reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kdx.data.labelled_images import Dataset
from kdx.data.sources import arrays, cifar, composites, digits, hugging_face, image_files, parquet_files, tar_shards
from kdx.remote import as_path


def _absolute(place: str) -> str:
    return str(as_path(place).expanduser().resolve())


@dataclass(frozen=True)
class Source:
    """How a kind of data reference is opened.

    open: the data set of a reference and of what follows ``SOURCE:`` in it. locate: the latter with an absolute path. place: whether
    something follows; where it need not, the name of the source is a reference.
    """

    open: Callable[[str, str], Dataset]
    locate: Callable[[str], str] = _absolute
    place: Literal["required", "optional", "none"] = "required"

    def accepts(self, reference: str) -> bool:
        """Whether a reference that begins with the name of this source belongs to it."""
        _, colon, place = reference.partition(":")
        return not colon if self.place == "none" else bool(place) or (not colon and self.place == "optional")


SOURCES = {
    "folder": Source(image_files.open_folder),
    "csv": Source(image_files.open_table),
    "npz": Source(arrays.open_npz),
    "cifar10": Source(cifar.open_cifar10),
    "cifar100": Source(cifar.open_cifar100),
    "hfdata": Source(hugging_face.open_hugging_face, hugging_face.locate),
    "parquet": Source(parquet_files.open_parquet, parquet_files.locate_parquet),
    "wds": Source(tar_shards.open_shards, tar_shards.locate_shards),
    "digits": Source(digits.open_digits, str, "none"),
    "composites": Source(composites.open_composites, composites.canonical_options, "optional"),
}
"""The sources by the name that begins a reference. `kdx.choices.DATA_REFERENCES` describes the references."""
