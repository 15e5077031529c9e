"""Image files in folders, and image files that a table lists."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kdx.data.class_folders import FolderImage, list_images, natural_key, utf8_name
from kdx.data.label_tables import read_label_table
from kdx.data.labelled_images import Dataset, splits_by_name
from kdx.data.remote_listing import listed
from kdx.remote import RemotePath, as_path


def open_folder(reference: str, place: str, *, labelled: bool = True) -> Dataset:
    """The images below a folder, in any of the layouts of `kdx.data.class_folders.list_images`."""
    listing = list_images(listed(as_path(place).expanduser()), labelled=labelled)
    return _of_files(reference, listing.root, listing.images, listing.note())


def open_table(reference: str, place: str) -> Dataset:
    """The images that a CSV file lists with their labels (`kdx.data.label_tables.read_label_table`)."""
    given = as_path(place).expanduser()
    table = listed(given.parent) / given.name
    return _of_files(reference, table.parent, read_label_table(table), "")


def _of_files(reference: str, folder: Path, images: Sequence[FolderImage], note: str) -> Dataset:
    """The data set of image files below a folder."""
    classes = tuple(sorted({image.class_name for image in images}, key=natural_key))
    numbers = {name: number for number, name in enumerate(classes)}
    paths = [image.path for image in images]
    ids = tuple(utf8_name(_relative(path, folder)) for path in paths)
    labels = np.array([numbers[image.class_name] for image in images], dtype=np.int64)
    splits = splits_by_name([image.split for image in images])
    files = dict(zip(ids, paths, strict=True))
    return Dataset(reference, classes, labels, ids, files, lambda index: _opened(paths[index]), splits, note)


def _opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else path)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
