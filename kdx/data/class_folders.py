"""Images in class folders: which files there are, with their classes and splits, and which are left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from kdx.data.image_types import decodable_suffixes, decoding_hint, is_image_type
from kdx.errors import KdxError, printable

SPLIT_NAMES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""The splits by the names that folders and tables may give them."""

_ANIMATED = (".gif", ".apng", ".avifs", ".flc", ".fli")

_NOT_AN_IMAGE = "not an image type"
_NOT_DECODED = "not decoded by Pillow"


@dataclass(frozen=True)
class FolderImage:
    """An image file, the name of its class, and its split: train, validation, test, or "" if the folder has no splits."""

    path: Path
    class_name: str
    split: str


@dataclass
class Listing:
    """The images of a folder, and what beside them is not used.

    skipped: numbers of files by (suffix, reason). without_images: the folders, relative to the data folder, that would be classes if they
    contained images.
    """

    images: list[FolderImage] = field(default_factory=list)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    without_images: list[str] = field(default_factory=list)

    def note(self) -> str:
        """One line about files and folders that are not used and about animations; "" if there are none.

        It begins with ``Warning:`` if a class or an image may be missing.
        """
        sentences = []
        if self.skipped:
            counts = [f"{count} {suffix or 'without a suffix'} ({reason})" for (suffix, reason), count in sorted(self.skipped.items())]
            sentences.append(f"Files left out: {', '.join(counts)}.")
        if self.without_images:
            names = ", ".join(map(repr, self.without_images))
            sentences.append(f"No classes, because they contain no images: {names}.")
        animated = sum(image.path.suffix.lower() in _ANIMATED for image in self.images)
        if animated:
            sentences.append(f"Animations count with their first frame ({animated} files of a type that can be animated).")
        lost = self.without_images or any(reason != _NOT_AN_IMAGE for _, reason in self.skipped)
        return printable(" ".join(["Warning:"] * bool(lost) + sentences))

    def join(self, other: Listing) -> None:
        """Add the contents of another part of the same folder."""
        self.images += other.images
        self.skipped.update(other.skipped)
        self.without_images += other.without_images


def list_images(folder: Path) -> Listing:
    """The images of FOLDER/class/... or FOLDER/split/class/..., in natural order within each split, and what is left out.

    Every type that Pillow decodes is an image, in any case of its suffix. Hidden files are left out. Raises KdxError for a folder that is
    missing, or that has no images in class folders, and for a class folder whose images are all of types that Pillow does not decode here.
    """
    if not folder.is_dir():
        problem = f"{folder} is not a folder." if folder.exists() else f"There is no folder {folder}."
        raise KdxError(problem, "A data reference is a folder of class folders, cifar10:FOLDER, or digits.")
    listing = _list_splits(folder) or _list_classes(folder, "", folder)
    if not listing.images:
        raise _no_images(folder)
    listing.skipped.update(_loose_images(folder))
    return listing


def _list_splits(folder: Path) -> Listing | None:
    """The images of FOLDER/split/class/..., or None if the folder does not have this layout.

    A folder ``train`` may also be an ordinary class (of vehicles). It is a split if it contains class folders and if every folder
    beside it that contains images is a split too.
    """
    subfolders = [(subfolder, SPLIT_NAMES.get(subfolder.name.lower(), "")) for subfolder in _subfolders(folder)]
    if any(not split and _has_images(subfolder) for subfolder, split in subfolders):
        return None
    listing = Listing()
    for subfolder, split in subfolders:
        if split:
            listing.join(_list_classes(subfolder, split, folder))
            listing.skipped.update(_loose_images(subfolder))
    return listing if any(image.split == "train" for image in listing.images) else None


def _list_classes(root: Path, split: str, folder: Path) -> Listing:
    """The images in the class folders of ``root``, at any depth, in natural order. folder: the data folder."""
    listing = Listing()
    for subfolder in _subfolders(root):
        images: list[Path] = []
        skipped: Counter[tuple[str, str]] = Counter()
        for path in subfolder.rglob("*"):
            reason = _reason_to_skip(path)
            if reason == "":
                images.append(path)
            elif reason is not None:
                skipped[path.suffix.lower(), reason] += 1
        if not images:
            _check_types(subfolder, skipped)
            listing.without_images.append(utf8_name(subfolder.relative_to(folder).as_posix()))
        listing.images += [FolderImage(path, subfolder.name, split) for path in images]
        listing.skipped.update(skipped)
    listing.images.sort(key=lambda image: natural_key(image.path.relative_to(root).as_posix()))
    return listing


def _reason_to_skip(path: Path) -> str | None:
    """Why a path in a class folder is not used as an image; "" for an image, None for a path that nobody would take for one."""
    suffix = path.suffix.lower()
    hidden = path.name.startswith(".")
    if suffix in decodable_suffixes() and path.is_file():
        return "hidden" if hidden else ""
    if path.is_symlink() and not path.is_file():
        return "linked folder" if path.is_dir() else "broken link"
    if hidden or not path.is_file():
        return None
    return _NOT_DECODED if is_image_type(suffix) else _NOT_AN_IMAGE


def _check_types(subfolder: Path, skipped: Counter[tuple[str, str]]) -> None:
    """KdxError for a class folder that contains images, and none that Pillow decodes."""
    counts = {suffix: count for (suffix, reason), count in skipped.items() if reason == _NOT_DECODED}
    if counts:
        types = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        raise KdxError(f"Pillow does not decode the images in the class folder {subfolder}: {types}.", decoding_hint(counts.keys()))


def _loose_images(folder: Path) -> Counter[tuple[str, str]]:
    """The images that are in ``folder`` itself and so have no class."""
    suffixes = (path.suffix.lower() for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    return Counter((suffix, "in no class folder") for suffix in suffixes if is_image_type(suffix))


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in decodable_suffixes() for path in folder.rglob("*"))


def _subfolders(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(visible, key=lambda path: natural_key(path.name))


def _no_images(folder: Path) -> KdxError:
    if _loose_images(folder):
        return KdxError(
            f"{folder} has images but no class folders.", "Put the images of each class into a folder with its name: FOLDER/cat/1.jpg."
        )
    return KdxError(
        f"{folder} has no images in class folders.",
        "Give a folder FOLDER/class/image with images of types that Pillow decodes, such as .jpg.",
    )


def utf8_name(name: str) -> str:
    """A file name as valid UTF-8, so that it can be written to any file of a run; other bytes become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """A sort key that places 2 before 10. The text itself decides between equal numbers such as 01 and 1."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts), text
