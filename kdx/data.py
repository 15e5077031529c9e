"""Data references -> images and labels; splits, class-balanced batches, decoding. Every random choice has a seed."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from kdx.errors import KdxError
from kdx.prefetch import Job, ahead, cores

Indices = NDArray[np.int64]

SPLITS = ("train", "validation", "test")
_SPLIT_FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_RECORD = 1 + 3 * 32 * 32
_SMALLEST_BATCH = 4  # U-centred geometry needs four images


@dataclass(frozen=True)
class Dataset:
    """Labelled images that are decoded when asked for.

    ``labels`` [N] index ``classes``; ``ids`` name the images (a path relative to the folder, ``digits/0012``);
    ``fingerprint`` changes with the names, the labels and the files; ``splits`` holds what the data itself prescribes.
    """

    reference: str
    classes: tuple[str, ...]
    labels: Indices
    ids: tuple[str, ...]
    fingerprint: str
    reader: Callable[[int], Image.Image] = field(repr=False)
    splits: Mapping[str, Indices] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        """Image ``index`` as 8-bit RGB at its own size, upright; OSError, ValueError and the like for a corrupt one."""
        with self.reader(index) as image:
            return _rgb(image)


# ---- opening ----


def open_data(reference: str, classes: Sequence[str] | None = None) -> Dataset:
    """The data set a reference names.

    ``digits``: scikit-learn's 1797 scans of handwritten digits, 8 x 8. ``cifar10:FOLDER``: the published binary version
    (``*.bin``), where test_batch.bin is the test split. Else a folder of class folders, FOLDER/class/*.jpg (also jpeg, png, bmp,
    webp, tif), or FOLDER/train/class/... beside val, valid or validation, and test, which are then the splits. Class folders are in
    natural order (2 before 10). With ``classes`` labels index those, and the data may hold some of them only.

    Raises KdxError for a folder that is missing or empty or has no class folders, for one class alone, and for a class that is not
    among ``classes``.
    """
    source, _, place = reference.partition(":")
    if reference == "digits":
        dataset = _open_digits()
    elif source == "cifar10" and place:
        dataset = _open_cifar10(reference, Path(place).expanduser())
    else:
        dataset = _open_folder(reference, Path(reference).expanduser())
    return dataset if classes is None else _relabelled(dataset, tuple(classes))


def _open_digits() -> Dataset:
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0 to 16
    labels = scans.target.astype(np.int64)
    ids = tuple(f"digits/{index:04d}" for index in range(len(labels)))
    classes = tuple(str(digit) for digit in range(10))
    return Dataset(
        "digits", classes, labels, ids, _fingerprint(ids, labels, [pixels.tobytes()]), lambda index: Image.fromarray(pixels[index])
    )


def _open_cifar10(reference: str, folder: Path) -> Dataset:
    files = sorted(folder.glob("*.bin"), key=lambda path: _natural(path.name)) if folder.is_dir() else []
    if not files:
        raise KdxError(
            f"There is no *.bin file in {folder}.",
            "Give the folder of CIFAR-10's binary version (cifar-10-batches-bin); the python version is pickled, which kdx does not read.",
        )
    for path in files:
        if path.stat().st_size == 0 or path.stat().st_size % _CIFAR_RECORD:
            raise KdxError(
                f"{path} is not whole records of {_CIFAR_RECORD} bytes.", "Unpack the archive again; CIFAR-100 has other records."
            )
    batches = [np.fromfile(path, dtype=np.uint8).reshape(-1, _CIFAR_RECORD) for path in files]
    records = np.concatenate(batches)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(_CIFAR10):
        raise KdxError(f"{folder} has a label {labels.max()}, which CIFAR-10 has not.", "Give the folder of CIFAR-10's binary version.")
    ids = tuple(f"{path.name}/{row:05d}" for path, batch in zip(files, batches, strict=True) for row in range(len(batch)))
    test = np.concatenate([np.full(len(batch), path.stem == "test_batch") for path, batch in zip(files, batches, strict=True)])
    splits = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)} if 0 < test.sum() < len(test) else {}

    def read(index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(records[index, 1:].reshape(3, 32, 32).transpose(1, 2, 0)))

    return Dataset(reference, _CIFAR10, labels, ids, _fingerprint(ids, labels, [records.tobytes()]), read, splits)


def _open_folder(reference: str, folder: Path) -> Dataset:
    if not folder.is_dir():
        problem = f"{folder} is not a folder." if folder.exists() else f"There is no folder {folder}."
        raise KdxError(problem, "A data reference is a folder of class folders, cifar10:FOLDER, or digits.")
    found = _prescribed(folder) or [(path, path.relative_to(folder).parts[0], "") for path in _images(folder)]
    if not found:
        raise _no_images(folder)
    classes = tuple(sorted({name for _, name, _ in found}, key=_natural))
    if len(classes) < 2:
        raise KdxError(
            f"{folder} has one class only, {classes[0]!r}.", "Relevance compares classes: give a folder with two class folders or more."
        )
    paths = [path for path, _, _ in found]
    ids = tuple(_written(path.relative_to(folder).as_posix()) for path in paths)
    labels = np.array([classes.index(name) for _, name, _ in found], dtype=np.int64)
    of = np.array([part for _, _, part in found])
    splits = {part: np.flatnonzero(of == part) for part in SPLITS if (of == part).any()}
    states = [path.stat() for path in paths]
    stamps = [f"{state.st_size} {state.st_mtime_ns}".encode() for state in states]
    return Dataset(reference, classes, labels, ids, _fingerprint(ids, labels, stamps), lambda index: Image.open(paths[index]), splits)


def _prescribed(folder: Path) -> list[tuple[Path, str, str]]:
    """Path, class and split of each image of FOLDER/train/class/...; nothing where the folder is not laid out so.

    ``train`` may be a class like any other (of vehicles): it is a split where it has class folders and no other class is beside it.
    """
    parts = [(top, _SPLIT_FOLDERS.get(top.name.lower(), "")) for top in _folders(folder)]
    found = [(path, path.relative_to(top).parts[0], part) for top, part in parts if part for path in _images(top)]
    beside = any(next(top.rglob(f"*{suffix}"), None) for top, part in parts if not part for suffix in _SUFFIXES)
    return found if not beside and any(part == "train" for _, _, part in found) else []


def _folders(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")), key=lambda path: _natural(path.name)
    )


def _images(root: Path) -> list[Path]:
    """The images in the class folders of ``root``, at any depth, in natural order."""
    paths = (path for top in _folders(root) for path in top.rglob("*"))
    kept = (path for path in paths if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file())
    return sorted(kept, key=lambda path: _natural(path.relative_to(root).as_posix()))


def _no_images(folder: Path) -> KdxError:
    if any(path.suffix.lower() in _SUFFIXES for path in folder.iterdir()):
        return KdxError(
            f"{folder} has images but no class folders.", "Put the images of each class into a folder with its name: FOLDER/cat/1.jpg."
        )
    return KdxError(
        f"{folder} has no images in class folders.", f"Give a folder FOLDER/class/image with images of kind {', '.join(_SUFFIXES)}."
    )


def _natural(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """A key that sorts 2 before 10; the text itself settles ties such as 01 and 1."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts), text


def _written(name: str) -> str:
    """A file's name as text that every file of a run can hold: bytes that are not UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _fingerprint(ids: Sequence[str], labels: Indices, contents: Sequence[bytes]) -> str:
    digest = hashlib.sha256("\n".join(ids).encode("utf-8", "surrogateescape"))
    digest.update(labels.tobytes())
    for content in contents:
        digest.update(content + b"\n")
    return digest.hexdigest()


def _relabelled(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    for name in dataset.classes:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3) or classes[:5]
            raise KdxError(
                f"The data has a class {name!r} that the models do not have.",
                f"Rename or remove its folder; near matches: {', '.join(near)}.",
            )
    labels = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)[dataset.labels]
    fingerprint = _fingerprint(dataset.ids, labels, [dataset.fingerprint.encode()])
    return Dataset(dataset.reference, classes, labels, dataset.ids, fingerprint, dataset.reader, dataset.splits)


# ---- splits and batches ----


def split(dataset: Dataset, seed: int) -> dict[str, Indices]:
    """Sorted, disjoint indices under train, validation and test.

    What the data prescribes is kept; a validation or test split that it lacks is taken, stratified, from its train split. With nothing
    prescribed: 60 % train, 15 % validation, 25 % test, stratified. The same seed gives the same split.
    """
    generator = np.random.default_rng(seed)
    rest = dataset.splits.get("train", np.arange(len(dataset), dtype=np.int64))
    parts = {name: dataset.splits[name] for name in ("test", "validation") if name in dataset.splits}
    for name, share in (("test", 0.25), ("validation", 0.2 if "test" not in parts else 0.15)):
        if name not in parts:
            parts[name], rest = _carve(dataset.labels, rest, share, generator)
    return {"train": np.sort(rest), "validation": np.sort(parts["validation"]), "test": np.sort(parts["test"])}


def _carve(labels: Indices, indices: Indices, share: float, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """A stratified share of ``indices``, and the others."""
    taken = []
    for label in np.unique(labels[indices]):
        members = generator.permutation(indices[labels[indices] == label])
        taken.append(members[: round(share * len(members))])
    part = np.concatenate(taken)
    return part, np.setdiff1d(indices, part)


def random_batches(labels: NDArray[np.integer], size: int, seed: int) -> list[Indices]:
    """Every position of ``labels`` [N] in exactly one batch, at random, so that scores pooled over batches estimate the whole set's.

    Batches with even classes would not: they hold fewer pairs of one class than the set, and scores with the target come out low.
    Only a batch without two images of one class beside two of others, which has no target geometry, is mended by swapping an image.
    ceil(N / size) batches, fewer where they would hold under four images; their sizes differ by one at most. No batch holds
    more than max(size, 7). KdxError for fewer than four images, for one class, for a size under four, and where no swap helps.
    """
    labels = np.asarray(labels)
    if size < _SMALLEST_BATCH:
        raise KdxError(f"A batch of {size} is too small for pairwise geometry.", "Give a batch of 4 or more; scores are steady from 32 up.")
    if len(labels) < _SMALLEST_BATCH:
        raise KdxError(f"{len(labels)} images are too few for pairwise geometry.", "Give 4 images or more; scores are steady from 32 up.")
    if len(np.unique(labels)) < 2:
        raise KdxError("All the images are of one class, and relevance compares classes.", "Give images of two classes or more.")
    count = max(1, min(-(-len(labels) // size), len(labels) // _SMALLEST_BATCH))
    shuffled = np.random.default_rng(seed).permutation(len(labels)).astype(np.int64)
    batches = [shuffled[start::count] for start in range(count)]
    for batch in batches:
        if not _mend(batch, batches, labels):
            raise KdxError(
                f"Batches of {len(batch)} of these {len(labels)} images do not all hold two images of one class and two of others.",
                "Give a larger --batch, or more images a class.",
            )
    return [np.sort(batch) for batch in batches]


def _lacking(labels: NDArray[np.integer]) -> int:
    """Images to exchange until labels have a geometry: two of one class beside two of others. Centring takes one image apart from all
    others, or all apart from all, for nothing."""
    most = int(np.unique(labels, return_counts=True)[1].max())
    return 1 if most == 1 else max(0, 2 - (len(labels) - most))


def _mend(batch: Indices, batches: Sequence[Indices], labels: NDArray[np.integer]) -> bool:
    """Exchange images of ``batch`` with some of other batches, in place, until it has a geometry; whether it could be done."""
    return all(_exchange(batch, batches, labels) for _ in range(_lacking(labels[batch])))


def _exchange(batch: Indices, batches: Sequence[Indices], labels: NDArray[np.integer]) -> bool:
    """One image, so that ``batch`` lacks fewer and the other batch no more; whether there is one."""
    for other in batches:
        if other is batch:
            continue
        before = _lacking(labels[batch]), _lacking(labels[other])
        for i, j in itertools.product(range(len(batch)), range(len(other))):
            batch[i], other[j] = other[j], batch[i]
            if _lacking(labels[batch]) < before[0] and _lacking(labels[other]) <= before[1]:
                return True
            batch[i], other[j] = other[j], batch[i]
    return False


def _shuffled_by_class(labels: NDArray[np.integer], seed: int) -> Indices:
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.unique(labels))  # so that no class is always first to be dealt one more
    return np.concatenate([generator.permutation(np.flatnonzero(labels == label)) for label in classes]).astype(np.int64)


def class_balanced_sample(labels: NDArray[np.integer], count: int, seed: int) -> Indices:
    """``count`` sorted positions of ``labels`` [N] with the classes as even as they can be; all N where ``count`` is more.

    A class with fewer images than its share gives all it has, and the others make up for it.
    """
    labels = np.asarray(labels)
    if count < 1:
        raise ValueError("count is 1 or more")
    order = _shuffled_by_class(labels, seed)
    # The round of an image is how many of its class were drawn before it: whole rounds are balanced.
    turns = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels[order] == label)
        turns[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turns, kind="stable")[:count]])


# ---- pixels ----


@dataclass(frozen=True)
class Images:
    """Decoded images: ``pixels`` [n, 3, H, W] float32 in [0, 1], the indices that were kept, and what could not be read, and why."""

    pixels: Tensor
    kept: Indices
    unreadable: tuple[tuple[str, str], ...]


def load_images(dataset: Dataset, indices: Sequence[int] | Indices, size: tuple[int, int]) -> Images:
    """Decode images, in order: RGB, shorter side resized (bicubic, antialiased) to cover ``size`` = (height, width), centre crop.

    An image that is corrupt, truncated or too large to be safe (PIL's decompression bomb limit) is left out and named in
    ``unreadable`` with the reason; nothing is raised for it.
    """
    with decoded(dataset, [np.asarray(indices, dtype=np.int64)], size) as found:
        return next(found)


@contextmanager
def decoded(dataset: Dataset, batches: Iterable[Indices], size: tuple[int, int], workers: int | None = None) -> Iterator[Iterator[Images]]:
    """`load_images` of each batch, in order, decoded by ``workers`` threads while those before are in use.

    No more than `kdx.prefetch.AHEAD` batches are held beyond the one that was taken. By default there is a thread a core; with 0 each
    batch is decoded when it is asked for. The pixels are the same for any number: Pillow decodes and resizes without the interpreter's
    lock, and each image is written to its own place.
    """
    # Filters hold for all threads, so they are set here and not in each; PIL's remarks on odd files are of no use to a user.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.|kdx\.data")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with ahead((_job(dataset, batch, size) for batch in batches), cores() if workers is None else workers) as results:
            yield results


def _job(dataset: Dataset, indices: Indices, size: tuple[int, int]) -> Job[Images]:
    """A part an image, which fills its row of the pixels or says why it cannot."""
    pixels = torch.empty(len(indices), 3, *size)
    reasons: list[str] = [""] * len(indices)

    def decode(row: int) -> None:
        try:
            levels = np.asarray(fit(dataset.read(int(indices[row])), size))  # [H, W, 3]
        except Exception as error:  # decoders raise SyntaxError, struct.error, MemoryError and more on damaged files
            reasons[row] = f"{type(error).__name__}: {error}"
        else:
            np.divide(levels.transpose(2, 0, 1), np.float32(255), out=pixels[row].numpy())

    def result() -> Images:
        bad = np.array([bool(reason) for reason in reasons], dtype=bool)
        unreadable = tuple((dataset.ids[index], reason) for index, reason in zip(indices, reasons, strict=True) if reason)
        return Images(pixels[torch.from_numpy(~bad)] if unreadable else pixels, indices[~bad], unreadable)

    return Job([partial(decode, row) for row in range(len(indices))], result)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` resized (bicubic, antialiased) so that it just covers ``size`` = (height, width), then cropped at its centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image if covering == image.size else image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: EXIF orientation applied, alpha over white, 16-bit scaled, palettes and CMYK converted. ``image`` itself may change."""
    ImageOps.exif_transpose(image, in_place=True)  # a copy of the whole image otherwise, as is convert to the mode that it has
    image.load()
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        levels = np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255)  # 65535 / 257 = 255
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    elif image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.rint(np.clip(levels * (255 if levels.max() <= 1 else 1), 0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
