"""Images below a folder: which files there are, with their classes and splits, and which are left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from kdx.choices import DATA_KINDS
from kdx.data.image_types import decodable_suffixes, decoding_hint, is_image_type
from kdx.errors import KdxError, printable

SPLIT_NAMES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""The splits by the names that folders and tables may give them."""

_ANIMATED = (".gif", ".apng", ".avifs", ".flc", ".fli")

_WRAPPERS = 3
"""How many folders inside each other may surround the data set, as in many archives."""

_NAMED = re.compile(r"([^.]+)\.[0-9]+\.[^.]+")
"""A file name that begins with the class of the image: ``cat.0.jpg``."""

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

    root: the folder that the images are named relative to. inner: its path relative to the folder of the reference, if it is inside that.
    skipped: numbers of files by (suffix, reason). without_images: the folders, relative to the data folder, that would be classes if they
    contained images.
    """

    root: Path
    inner: str = ""
    images: list[FolderImage] = field(default_factory=list)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    without_images: list[str] = field(default_factory=list)

    def note(self) -> str:
        """One line about files and folders that are not used and about animations; "" if there are none.

        It begins with ``Warning:`` if a class or an image may be missing.
        """
        sentences = [f"The data set is the folder {self.inner!r}."] if self.inner else []
        if self.skipped:
            counts = [f"{count} {suffix or 'without a suffix'} ({reason})" for (suffix, reason), count in sorted(self.skipped.items())]
            sentences.append(f"Files left out: {', '.join(counts)}.")
        if self.without_images:
            names = ", ".join(map(repr, self.without_images))
            sentences.append(f"No classes, because they contain no images: {names}.")
        animated = sum(image.path.suffix.lower() in _ANIMATED for image in self.images)
        if animated:
            files = "1 file is" if animated == 1 else f"{animated} files are"
            sentences.append(f"Only the first frame of an animation is used ({files} of a type that can be animated).")
        lost = self.without_images or any(reason != _NOT_AN_IMAGE for _, reason in self.skipped)
        return printable(" ".join(["Warning:"] * bool(lost) + sentences))

    def join(self, other: Listing) -> None:
        """Add the contents of another part of the same folder."""
        self.images += other.images
        self.skipped.update(other.skipped)
        self.without_images += other.without_images


def list_images(folder: Path, *, labelled: bool = True) -> Listing:
    """The images below a folder, in natural order within each split, and what is left out.

    The layouts are FOLDER/class/..., FOLDER/split/class/..., and files without class folders whose names begin with the class, as in
    ``cat.0.jpg``, in FOLDER or FOLDER/split. Up to three folders inside each other may surround the data set, each of which contains
    nothing else with images. A split whose classes are not all in ``train`` is left out.

    labelled: whether images without class folders are refused. Otherwise they have the folder's name as their class.

    Every type that Pillow decodes is an image, in any case of its suffix. Hidden files are left out. Raises KdxError for a folder that is
    missing or has no images in one of these layouts, for a class folder whose images are all of types that Pillow does not decode here, and
    for a data set with splits that is beside other folders with images.
    """
    if not folder.is_dir():
        problem = f"{folder} is not a folder." if folder.exists() else f"There is no folder {folder}."
        raise KdxError(problem, f"Give {DATA_KINDS}.")
    root = _inner_folder(folder)
    listing = _list_splits(root) or _list_named(root, "", root)
    if listing is None:
        _check_layout(root)
        listing = _list_classes(root, "", root)
        listing.skipped.update(_loose_images(root))
    if not listing.images and not labelled:
        listing = _list_unlabelled(root)
    if not listing.images:
        raise _no_images(folder)
    listing.inner = utf8_name(root.relative_to(folder).as_posix()) if root != folder else ""
    return listing


def _inner_folder(folder: Path, is_split: bool = False) -> Path:
    """The data set, or the split of one, in ``folder``: this folder, or the one that it surrounds."""
    inner = folder
    for _ in range(_WRAPPERS):
        with_images = [subfolder for subfolder in _subfolders(inner) if _has_images(subfolder)]
        if len(with_images) != 1 or (with_images[0].name.lower() in SPLIT_NAMES and not is_split) or _loose_images(inner):
            return folder
        inner = with_images[0]
        classes = [subfolder for subfolder in _subfolders(inner) if _has_images(subfolder)]
        if len(classes) > 1 or any(subfolder.name.lower() in SPLIT_NAMES for subfolder in classes) or _list_named(inner, "", inner):
            return inner
    return folder


def _list_splits(folder: Path) -> Listing | None:
    """The images of FOLDER/split/..., or None if the folder does not have this layout.

    A folder ``train`` may also be an ordinary class (of vehicles). It is a split if it contains class folders and if every folder
    beside it that contains images is a split too, or if its images are named by class.
    """
    parts: list[Listing] = []
    others = []
    is_named = False
    for subfolder in _subfolders(folder):
        split = SPLIT_NAMES.get(subfolder.name.lower())
        if split is not None:
            inner = _inner_folder(subfolder, is_split=True)
            named = _list_named(inner, split, folder)
            is_named = is_named or (named is not None and split == "train")
            parts.append(_list_classes(inner, split, folder) if named is None else named)
            if named is None:
                parts[-1].skipped.update(_loose_images(inner))
        elif _has_images(subfolder):
            others.append(subfolder)
    classes = {image.class_name for part in parts for image in part.images if image.split == "train"}
    if not classes or (others and not is_named):
        return None
    listing = Listing(folder)
    for part in parts:
        if not {image.class_name for image in part.images} <= classes:
            part.skipped.update((image.path.suffix.lower(), "in a split with other classes") for image in part.images)
            part.images.clear()
        listing.join(part)
    for subfolder in others:
        listing.skipped.update((path.suffix.lower(), "without a class") for path in subfolder.rglob("*") if _reason_to_skip(path) == "")
    listing.skipped.update(_loose_images(folder))
    return listing


def _list_named(root: Path, split: str, folder: Path) -> Listing | None:
    """The images in ``root`` whose names begin with their classes, or None if an image is named otherwise, is in a folder, or if there
    is only one class. folder: the data folder."""
    listing = Listing(folder)
    for path in root.iterdir():
        reason = _reason_to_skip(path)
        if path.is_dir():
            if _has_images(path):
                return None
        elif reason == "":
            match = _NAMED.fullmatch(path.name)
            if match is None:
                return None
            listing.images.append(FolderImage(path, match[1], split))
        elif reason is not None:
            listing.skipped[path.suffix.lower(), reason] += 1
    listing.images.sort(key=lambda image: natural_key(image.path.name))
    return listing if len({image.class_name for image in listing.images}) > 1 else None


def _list_unlabelled(folder: Path) -> Listing:
    """The images in ``folder`` itself, in natural order, with its name as their class."""
    listing = Listing(folder)
    for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
        reason = _reason_to_skip(path)
        if reason == "":
            listing.images.append(FolderImage(path, folder.name, ""))
        elif reason is not None:
            listing.skipped[path.suffix.lower(), reason] += 1
    return listing


def _check_layout(folder: Path) -> None:
    """KdxError if a folder that would be a class is a data set with splits, as in an archive of several data sets."""
    for subfolder in _subfolders(folder):
        for path in (subfolder, *_subfolders(subfolder)):
            for split in _subfolders(path):
                if split.name.lower() == "train" and sum(map(_has_images, _subfolders(split))) > 1:
                    raise KdxError(f"{folder} contains a data set with splits beside other folders with images.", f"Give {path} instead.")


def _list_classes(root: Path, split: str, folder: Path) -> Listing:
    """The images in the class folders of ``root``, at any depth, in natural order. folder: the data folder."""
    listing = Listing(folder)
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
            f"{folder} has images but no class folders.",
            "Put the images of each class into a folder with its name (FOLDER/cat/1.jpg), or name all files as in cat.1.jpg.",
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
