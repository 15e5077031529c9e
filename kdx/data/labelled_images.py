"""Labelled images that are decoded on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.choices import COVER, Resizing
from kdx.data.fingerprint import SourceFile, content_fingerprint, fingerprint_of_0_1_0, image_keys, stamps_of_0_1_0
from kdx.data.pixels import draft, fit, to_rgb
from kdx.remote import RemotePath

if TYPE_CHECKING:
    from kdx.data.gpu_decoder import GpuDecoder

Indices = NDArray[np.int64]

SPLITS = ("train", "validation", "test")


def splits_by_name(names: Sequence[str]) -> dict[str, Indices]:
    """The indices of each split that occurs in ``names``, which has the name of every image's split, or "" where it has none."""
    array = np.array(names)
    return {split: np.flatnonzero(array == split) for split in SPLITS if (array == split).any()}


@dataclass(frozen=True)
class Dataset:
    """Labelled images that are decoded on demand.

    ``labels`` [N] index ``classes``. ``ids`` name the images (a path relative to the folder, or ``digits/0012``). ``files`` are the files
    that they are read from, by name. ``splits`` are the indices of the splits that the data itself defines. ``note`` is one line about
    what was left out of a folder (`kdx.data.class_folders.Listing.note`). ``relabelled_from`` is the data set with its own classes, if
    ``classes`` are those of models. ``resizing`` states how images are brought to the size of the networks. ``masks`` returns where the
    objects of an image are, [k, height, width] at the image's own upright size, or None for an image without masks; it is None for data
    without masks. ``decoder`` decodes JPEG files on a GPU; None leaves all files to Pillow.
    ``draft`` lets Pillow decode large JPEG files at a fraction of their size (`kdx.data.pixels.draft`).
    """

    reference: str
    classes: tuple[str, ...]
    labels: Indices
    ids: Sequence[str]
    files: Mapping[str, SourceFile] = field(repr=False)
    reader: Callable[[int], Image.Image] = field(repr=False)
    splits: Mapping[str, Indices] = field(default_factory=dict, repr=False)
    note: str = field(default="", repr=False)
    relabelled_from: Dataset | None = field(default=None, repr=False)
    resizing: Resizing = COVER
    masks: Callable[[int], NDArray[np.bool_] | None] | None = field(default=None, repr=False)
    decoder: GpuDecoder | None = field(default=None, repr=False)
    draft: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        """Image ``index`` as upright 8-bit RGB at its own size; the first frame of an animation.

        A corrupt image raises OSError, ValueError or another exception.
        """
        with self.reader(index) as image:
            return to_rgb(image)

    def read_fitted(self, index: int, size: tuple[int, int]) -> Image.Image:
        """Image ``index`` as `read` returns it, brought to ``size`` = (height, width) as ``resizing`` states."""
        with self.reader(index) as image:
            box = draft(image, size, self.resizing) if self.draft else None
            return fit(to_rgb(image), size, self.resizing, box)

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the images, their names and their classes: see `kdx.data.fingerprint.content_fingerprint`.

        It depends neither on the folder's path nor on modification times, nor on the order of ``classes``.
        """
        return content_fingerprint(self.ids, [self.classes[label] for label in self.labels], self.files)

    @cached_property
    def has_file_per_image(self) -> bool:
        """Whether each image is in a file of its own."""
        return len(self.files) == len(self.ids) and all(file == name for file, name in zip(self.files, self.ids, strict=True))

    @cached_property
    def image_keys(self) -> NDArray[np.uint64] | None:
        """A number per image [N] that identifies it in other folders (`kdx.data.fingerprint.image_keys`); None if images share files or
        are at a URL, where every key would need a request."""
        is_remote = any(isinstance(file, RemotePath) for file in self.files.values())
        return image_keys(self.files) if self.has_file_per_image and not is_remote else None

    @cached_property
    def fingerprint_of_0_1_0(self) -> str:
        """The fingerprint that kdx 0.1.0 recorded. It changes with modification times and with the order of ``classes``."""
        original = self.relabelled_from
        stamps = stamps_of_0_1_0(self.ids, self.files) if original is None else [original.fingerprint_of_0_1_0.encode()]
        return fingerprint_of_0_1_0(self.ids, self.labels, stamps)
