"""WebDataset shards: tar files whose members of one name are a sample, such as ``0001.jpg`` and ``0001.cls``.

A tar file has no directory, so each shard is scanned once, and the places of its images are kept in the folder of kdx's caches. After
that, every image is read by its place, without the rest of the shard. Nothing is unpickled or executed: members other than images and
labels are counted by the extension of their names, and not read.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

import numpy as np
from PIL import Image

from kdx.data.class_folders import natural_key, utf8_name
from kdx.data.image_types import decodable_suffixes
from kdx.data.label_values import LABEL_COLUMNS, class_labels, class_names
from kdx.data.labelled_images import Dataset
from kdx.data.place_options import COLUMNS, located_place, place_options
from kdx.data.remote_listing import listed
from kdx.disk import cache_folder, parse_json, write_atomic
from kdx.errors import KdxError, first_line
from kdx.progress import progress
from kdx.remote import RemotePath, as_path, remote_errors

_FORM = "Write wds:PATTERN, such as wds:shards/{0000..0099}.tar, and optionally ,image=EXTENSION, ,label=cls or json.FIELD, ,classes=FILE."

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""The beginnings of compressed files."""

_LABEL_BYTES = 65_536
"""The most bytes of a member with a label."""

_FORMAT = 1

_THREADS = 8
"""The number of shards that are scanned at the same time, because at a URL each of them waits for its requests."""


@dataclass
class _Index:
    """The images of a shard: per image its key, the place and the number of its bytes, and its label ("" without one).

    unused: the number of members per extension that are neither images nor labels, and of images without a label (``no label``).
    """

    keys: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    unused: dict[str, int] = field(default_factory=dict)


def open_shards(reference: str, place: str) -> Dataset:
    """The images in WebDataset shards, local or at a URL.

    place: a folder, a pattern with ``*``, or one with ``{0000..0099}`` or ``{a,b}``. An image is a member of a type that Pillow decodes, or
    with the extension ``image``. Its label is in the member with the same name before the first dot: in ``.cls`` as an integer or a name,
    or in a field of ``.json``. ``label`` chooses one of these. ``classes`` is a text file with the names that integers index. Other members
    are not read.

    Raises KdxError for shards that do not exist, are damaged or compressed, and for images without labels.
    """
    pattern, options = place_options("wds", place, COLUMNS, _FORM)
    shards = _shards(pattern)
    indexes = _indexes(shards, options.get("image", ""), options.get("label", ""))
    counts = [len(index.keys) for index in indexes]
    if not sum(counts):
        raise KdxError(f"There are no images with labels in the shards {pattern}.", _FORM)
    names = _names(shards)
    ids = tuple(utf8_name(f"{name}/{key}") for name, index in zip(names, indexes, strict=True) for key in index.keys)
    if len(set(ids)) < len(ids):
        raise KdxError(f"Two images in the shards {pattern} have the same name.", "Give each sample of a shard a name of its own.")
    known = class_names(as_path(options["classes"]).expanduser()) if "classes" in options else None
    classes, labels = class_labels([label for index in indexes for label in index.labels], known, f"The labels of {pattern}", pattern)
    starts, sizes = (np.array([value for index in indexes for value in getattr(index, name)], np.int64) for name in ("starts", "sizes"))
    owners = np.repeat(np.arange(len(shards)), counts)

    def read(number: int) -> Image.Image:
        start = int(starts[number])
        return Image.open(io.BytesIO(_read_range(shards[owners[number]], start, start + int(sizes[number]))))

    return Dataset(reference, classes, labels, ids, dict(zip(names, shards, strict=True)), read, note=_note(indexes))


def locate_shards(place: str) -> str:
    """``place`` with absolute paths."""
    return located_place("wds", place, _FORM)


def _indexes(shards: list[Path], image: str, label: str) -> list[_Index]:
    indexes = []
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="kdx-shards") as pool, progress() as show:
        for index in pool.map(lambda shard: _index(shard, image, label), shards):
            indexes.append(index)
            if len(shards) > _THREADS:
                show("Places of images", len(indexes), len(shards), "shards")
    return indexes


def _note(indexes: list[_Index]) -> str:
    unused: Counter[str] = Counter()
    for index in indexes:
        unused.update(index.unused)
    lines = [f"Images are read one by one from {len(indexes)} shards, in any order, by their places in the files."]
    if unused:
        lines.append(f"Members left out: {', '.join(f'{count} {name}' for name, count in sorted(unused.items()))}.")
    return " ".join(["Warning:"] * ("no label" in unused) + lines)


def _shards(pattern: str) -> list[Path]:
    """The tar files that a pattern names, in natural order within each of its expansions."""
    shards: list[Path] = []
    folders: dict[Path, Path] = {}
    for name in _expanded(pattern):
        path = as_path(name).expanduser()
        if path.parent not in folders:
            folders[path.parent] = listed(path.parent)
        path = folders[path.parent] / path.name
        if "*" in path.name or "?" in path.name:
            matches = sorted(path.parent.glob(path.name), key=lambda path: natural_key(path.name))
        elif path.is_dir():
            matches = sorted(path.glob("*.tar"), key=lambda path: natural_key(path.name))
        else:
            matches = [path] if path.is_file() else []
        if not matches:
            raise KdxError(f"There are no shards {name}.", _FORM)
        shards += matches
    return shards


def _expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern with ``{first..last}`` and ``{a,b}`` stands for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for place, part in enumerate(parts):
        bounds = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", part)
        if place % 2 == 0:
            choices.append([part])
        elif bounds:
            first, last = int(bounds[1]), int(bounds[2])
            if not 0 <= last - first < 1_000_000:
                raise KdxError(f"{{{part}}} is not a range of shards.", _FORM)
            choices.append([f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    return map("".join, product(*choices))


def _names(shards: list[Path]) -> list[str]:
    """A name per shard: that of the file, or for all shards the whole path if two files have the same name."""
    names = [shard.name for shard in shards]
    return names if len(set(names)) == len(names) else [str(shard) for shard in shards]


def _read_range(path: Path, start: int, stop: int) -> bytes:
    if isinstance(path, RemotePath):
        return path.read_range(start, stop)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _index(shard: Path, image: str, label: str) -> _Index:
    """The index of a shard. If kdx's caches contain it, and the shard has not changed since, it is read from there."""
    try:
        if isinstance(shard, RemotePath):
            state: list[object] = [str(shard), asdict(shard.file)]
        else:
            status = shard.stat()
            state = [str(shard.resolve()), status.st_size, status.st_mtime_ns]
        key = hashlib.sha256(json.dumps([_FORMAT, *state, image, label, sorted(decodable_suffixes())]).encode()).hexdigest()
        cached = cache_folder() / "shards" / f"{key}.json"
        with suppress(OSError, ValueError, TypeError):  # it does not exist or is damaged
            return _Index(**parse_json(cached.read_text("utf-8")))
        index = _scanned(shard, image, label)
    except OSError as error:
        raise KdxError(f"The shard {shard} cannot be read: {error.strerror or first_line(error)}.", _FORM) from error
    with suppress(KdxError):  # a cache that cannot be written costs time only
        write_atomic(cached, json.dumps(asdict(index)).encode())
    return index


def _scanned(shard: Path, image: str, label: str) -> _Index:
    """The index of a shard, from its headers and its labels. Images are skipped."""
    with remote_errors(shard), shard.open("rb") as file:
        _check_uncompressed(shard, file)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                index = _of_members(tar, image.lower().lstrip("."), label)
                file.seek(tar.offset)  # tarfile ends silently at a damaged header
                if any(file.read(tarfile.BLOCKSIZE)):
                    raise tarfile.ReadError(f"there is no header at byte {tar.offset}")
                return index
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise KdxError(f"The shard {shard} is not a tar file or is damaged: {first_line(error)}.", "Write the shard again.") from error


class _Header(tarfile.TarInfo):
    """A header whose size cannot make the reader allocate much memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        is_description = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if header.size < 0 or (is_description and header.size > _LABEL_BYTES):
            raise tarfile.HeaderError("the size of a member is negative or too large")
        return header


def _check_uncompressed(shard: Path, file: IO[bytes]) -> None:
    beginning = file.read(8)
    for magic, name in _COMPRESSED.items():
        if beginning.startswith(magic):
            raise KdxError(
                f"The shard {shard} is compressed ({name}), so single images cannot be read from it.",
                "Decompress it; images are compressed already.",
            )
    file.seek(0)


def _of_members(tar: tarfile.TarFile, image: str, label: str) -> _Index:
    index, unused = _Index(), Counter[str]()
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int | str] = {}
    suffixes = {suffix.lstrip(".") for suffix in decodable_suffixes()}
    file_label, _, label_field = label.partition(".")
    last = -1
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a list of all members
        if member.offset <= last or member.size < 0:  # otherwise a damaged size could repeat members forever
            raise tarfile.ReadError("the size of a member is negative")
        last = member.offset
        if not member.isreg() or member.issparse():
            continue
        path = PurePosixPath(member.name)
        stem, _, extension = path.name.partition(".")
        key, extension = (path.parent / stem).as_posix(), extension.lower()
        if extension == image or (not image and extension in suffixes):
            images.setdefault(key, (member.offset_data, member.size))
        elif extension in ("cls", "json") and file_label in ("", extension) and member.size <= _LABEL_BYTES:
            content = tar.extractfile(member)
            value = None if content is None else _label(extension, content.read(), label_field)
            if value is not None and (extension == "cls" or key not in labels):
                labels[key] = value
        else:
            unused[f".{extension}"] += 1
    for key, (start, size) in images.items():
        if key not in labels:
            unused["no label"] += 1
            continue
        index.keys.append(key)
        index.starts.append(start)
        index.sizes.append(size)
        index.labels.append(labels[key])
    index.unused = dict(unused)
    return index


def _label(extension: str, content: bytes, name: str) -> int | str | None:
    """The label in a member; None if there is none."""
    try:
        text = content.decode("utf-8").strip()
        value: Any = text
        if extension == "json":
            fields = parse_json(text)
            value = next((fields[each] for each in ((name,) if name else LABEL_COLUMNS) if each in fields), None)
    except (ValueError, TypeError):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value or None
    return value if type(value) is int else None
