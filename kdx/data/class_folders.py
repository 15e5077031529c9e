"""Images in class folders: which files there are, with their classes and splits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kdx.errors import KdxError

_SPLIT_FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class FolderImage:
    """An image file, the name of its class, and its split: train, validation, test, or "" if the folder has no splits."""

    path: Path
    class_name: str
    split: str


def list_images(folder: Path) -> list[FolderImage]:
    """The images of FOLDER/class/... or FOLDER/split/class/..., in natural order within each split.

    Raises KdxError for a folder that is missing, or that has no images in class folders.
    """
    if not folder.is_dir():
        problem = f"{folder} is not a folder." if folder.exists() else f"There is no folder {folder}."
        raise KdxError(problem, "A data reference is a folder of class folders, cifar10:FOLDER, or digits.")
    images = _split_images(folder) or _class_images(folder, "")
    if not images:
        raise _no_images(folder)
    return images


def _split_images(folder: Path) -> list[FolderImage]:
    """The images of FOLDER/split/class/..., or nothing if the folder does not have this layout.

    A folder ``train`` may also be an ordinary class (of vehicles). It is a split if it contains class folders and if every folder
    beside it that contains images is a split too.
    """
    splits = [(subfolder, _SPLIT_FOLDERS.get(subfolder.name.lower(), "")) for subfolder in _subfolders(folder)]
    images = [image for subfolder, split in splits if split for image in _class_images(subfolder, split)]
    has_classes = any(next(subfolder.rglob(f"*{suffix}"), None) for subfolder, split in splits if not split for suffix in _SUFFIXES)
    return images if not has_classes and any(image.split == "train" for image in images) else []


def _class_images(root: Path, split: str) -> list[FolderImage]:
    """The images in the class folders of ``root``, at any depth, in natural order."""
    paths = (path for subfolder in _subfolders(root) for path in subfolder.rglob("*"))
    images = (path for path in paths if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file())
    ordered = sorted(images, key=lambda path: natural_key(path.relative_to(root).as_posix()))
    return [FolderImage(path, path.relative_to(root).parts[0], split) for path in ordered]


def _subfolders(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(visible, key=lambda path: natural_key(path.name))


def _no_images(folder: Path) -> KdxError:
    if any(path.suffix.lower() in _SUFFIXES for path in folder.iterdir()):
        return KdxError(
            f"{folder} has images but no class folders.", "Put the images of each class into a folder with its name: FOLDER/cat/1.jpg."
        )
    return KdxError(
        f"{folder} has no images in class folders.", f"Give a folder FOLDER/class/image with images of the types {', '.join(_SUFFIXES)}."
    )


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """A sort key that places 2 before 10. The text itself decides between equal numbers such as 01 and 1."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts), text
