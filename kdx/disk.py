"""Atomic writes, lock files, tables as CSV and the cache folder.

Paths may be at a URL (`kdx.remote.RemotePath`), where an object appears whole or not at all."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from kdx.errors import KdxError
from kdx.remote import RemotePath
from kdx.remote_lock import RemoteLock

log = logging.getLogger("kdx")


def cache_folder() -> Path:
    """The folder of kdx's caches: KDX_CACHE, else ``kdx`` in the platform's cache folder."""
    chosen = os.environ.get("KDX_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdx"


def lock_file(path: Path, *, wait: bool) -> IO[bytes]:
    """Open the lock file ``path`` and lock it until it is closed or the process ends.

    If another process holds the lock, waits for it, or raises BlockingIOError if ``wait`` is false. On a system that cannot lock
    files, the file is only opened, and a warning is logged.
    """
    lock = path.open("wb")
    try:
        import fcntl  # Windows does not have it

        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise
    except (ImportError, OSError) as error:  # some network file systems do not lock; a single process needs no lock
        log.warning("%s cannot be locked (%s): write to it from one process at a time.", path.parent, error)
    return lock


def scratch_folder(folder: Path) -> Path:
    """The folder for files of ``folder`` that must be on a local disk: ``folder`` itself, or for a URL a folder in `cache_folder`."""
    if not isinstance(folder, RemotePath):
        return folder
    return cache_folder() / "runs" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def remove_tree(folder: Path, *, ignore_errors: bool = False) -> None:
    """Delete a folder and everything in it."""
    if isinstance(folder, RemotePath):
        with suppress(OSError, KdxError) if ignore_errors else nullcontext():
            folder.remove_tree()
    else:
        shutil.rmtree(folder, ignore_errors=ignore_errors)


def lock_folder(folder: Path) -> IO[bytes] | RemoteLock:
    """Lock the folder's lock file until it is closed. Raises KdxError if another process has locked it."""
    try:
        if isinstance(folder, RemotePath):
            return RemoteLock.acquire(folder / ".lock")
        folder.mkdir(parents=True, exist_ok=True)
        return lock_file(folder / ".lock", wait=False)
    except BlockingIOError:
        raise KdxError(
            f"Another process is writing the run in {folder}.", "Wait until it ends, or stop it; or choose another --out."
        ) from None
    except OSError as error:
        raise KdxError(f"{folder} cannot be written: {error.strerror}.", "Make the folder writable, or choose another --out.") from error


def check_locked(folder: Path, lock: IO[bytes] | RemoteLock) -> None:
    """Raise KdxError if ``folder`` is no longer the folder that `lock_folder` locked: it was moved or deleted, its disk was removed,
    or, at a URL, another process has taken it over.

    Without this check, new files could be written into a new folder that lacks the earlier ones.
    """
    if isinstance(lock, RemoteLock):
        lock.check()
        return
    try:
        is_same = os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat())
    except OSError:
        is_same = False
    if not is_same:
        raise KdxError(
            f"{folder} was moved or deleted, or its disk was removed, while kdx wrote to it.",
            "Put the folder back, and run the same command again.",
        )


def parse_json(text: str | bytes) -> Any:
    """`json.loads` that raises ValueError also for values that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """`tomllib.loads` that raises ValueError also for values that are nested too deeply."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KdxError(f"{path} is not readable JSON: {error}.", "Delete the folder and run again.") from None
    if not isinstance(content, dict):
        raise KdxError(f"{path} is not a manifest.", "Delete the folder and run again.")
    return content


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """`replacing`, with the OSError as it is."""
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, path.name)
            path.write_bytes(Path(folder, path.name).read_bytes())
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``. The file that the block writes there replaces ``path`` when the block ends.

    ``path`` holds the old or the new content, never a part. An exception in the block keeps the old file and removes the temporary one.
    An OSError becomes a KdxError.
    """
    try:
        with _replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise unwritable(path, error) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` as a whole (`replacing`)."""
    if isinstance(path, RemotePath):
        try:
            path.write_bytes(content)
        except OSError as error:
            raise unwritable(path, error) from error
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def replace_file(path: Path, content: bytes) -> None:
    """`write_atomic` that raises the OSError itself."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path`` for writing ``path`` and the files that belong to it, under their final names.

    When the block ends, the files move into the folder of ``path``, with ``path`` last. If the block raises, they are removed and
    earlier files stay as they were. Raises KdxError for an OSError, also one raised in the block.
    """
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "Is a directory")
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            with _locked_if_free(leftover) as is_free:
                if is_free:  # the process that wrote there was killed
                    shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        with _locked_if_free(folder):
            yield folder
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                file.replace(path.parent / file.name)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked_if_free(folder: Path) -> Iterator[bool]:
    """Whether no other process has locked this folder, which is locked in the block; false if the system cannot lock folders."""
    descriptor = None
    try:
        import fcntl  # Windows does not have it

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = True
    except (ImportError, OSError):
        is_free = False
    try:
        yield is_free
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_through(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it, so that a file that is renamed into place is whole even after a power failure."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def unwritable(path: Path, error: OSError) -> KdxError:
    """The KdxError for a file that cannot be written."""
    return KdxError(f"{path} cannot be written: {error.strerror or error}.", "Choose a folder that you may write to, on a disk with room.")


def check_folder(folder: Path, kind: str, is_own: Callable[[Path], bool]) -> None:
    """Raise KdxError if the folder contains a file that does not belong to the command, which is about to write there.

    It would replace the page of another command, or put its files among a user's images. kind: what the folder may be, for the message.
    is_own: whether a path in the folder belongs to the command.
    """
    if folder.exists() and not (folder.is_dir() and all(path.name in (".DS_Store", ".lock") or is_own(path) for path in folder.iterdir())):
        raise KdxError(f"{folder} is neither empty nor {kind}.", "Choose a new folder for --out.")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of `replacing` in this folder, which a killed process left."""
    for path in folder.glob(".*.*"):
        if path.suffix[1:].isdecimal():
            path.unlink(missing_ok=True)


_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""The beginnings of fields that a spreadsheet may execute (OWASP, "CSV injection")."""


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV, with an empty field for None.

    A text that a spreadsheet may execute as a formula gets a leading apostrophe, which `csv_value` removes; texts of numbers do not.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(map(_harmless, columns))
    table.writerows(map(_harmless, row) for row in rows)
    return text.getvalue()


def _harmless(value: Any) -> Any:
    if not isinstance(value, str) or not value.lstrip("'").startswith(_FORMULA) or _is_number(value):
        return value
    return f"'{value}"


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False


def csv_value(text: str) -> str:
    """The text of a field that `csv_text` has written."""
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(_FORMULA) else text
