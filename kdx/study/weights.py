"""The weights of a study on disk: the files of a complete job, and links that store equal files only once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from kdx.choices import NO_BASE
from kdx.study.grid import MODELS, Job

_TRAINED = {"teacher": ("teacher",), "base": ("base",), "assistant": ("teacher", "student")}
"""The roles whose weights a training of each kind writes."""


def weights_files(job: Job) -> Iterator[Path]:
    """The files of weights of a complete job, relative to the study's folder."""
    folder = Path(job.folder)
    if job.kind != "cell":
        yield from (folder / f"{role}.safetensors" for role in _TRAINED[job.kind])
        return
    for role in ("teacher", "student", *(() if job.base in (None, NO_BASE) else ("base",))):
        yield folder / MODELS / f"{role}.safetensors"


class SharedWeights:
    """Replaces files of weights with equal contents by hard links to one file.

    Every cell has the files that `kdx distill` writes, so its folder can be copied and used alone, while the disk stores each teacher and
    each base once. kdx never writes into such a file; it replaces the file. If the file system has no hard links, the copies remain.
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[Path, _Version]] = {}
        """The file to link to and its version when it was read, by content."""
        self._inodes: set[tuple[int, int]] = set()

    def add(self, paths: Iterable[Path]) -> None:
        """Link each of these files to an equal one that was added before. Files that do not exist are left out."""
        for path in paths:
            with suppress(OSError):
                self._add(path)

    def _add(self, path: Path) -> None:
        version = _Version.of(path)
        if (version.device, version.inode) in self._inodes:
            return
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        first, read = self._first.setdefault(content, (path, version))
        if first is path or not first.is_file() or _Version.of(first) != read:  # another program may have replaced the first file
            self._first[content] = path, version
            self._inodes.add((version.device, version.inode))
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            os.link(first, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class _Version(NamedTuple):
    """The properties of a file that change when it is replaced or written."""

    device: int
    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Self:
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
