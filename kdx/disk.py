"""Files written whole or not at all, and the lock of a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kdx.errors import KdxError

log = logging.getLogger("kdx")


def lock_folder(folder: Path) -> IO[bytes]:
    """The folder's lock file, open and locked until it is closed; KdxError where another process has it locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")
    except OSError as error:
        raise KdxError(f"{folder} cannot be written: {error.strerror}.", "Make the folder writable, or choose another --out.") from error
    try:
        import fcntl  # which Windows has not

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise KdxError(
            f"Another process is writing the run in {folder}.", "Wait until it ends, or stop it; or choose another --out."
        ) from None
    except (ImportError, OSError) as error:  # nor have some network file systems; a run alone in its folder needs no lock
        log.warning("%s cannot be locked (%s): write to it from one process at a time.", folder, error)
    return lock


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KdxError(f"{path} is not readable JSON: {error}.", "Delete the folder and run again.") from None
    if not isinstance(content, dict):
        raise KdxError(f"{path} is not a manifest.", "Delete the folder and run again.")
    return content


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``. The file that the block writes there replaces ``path`` when the block ends.

    An exception in the block keeps the old file and removes the temporary one. An OSError becomes a KdxError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise KdxError(
            f"{path} cannot be written: {error.strerror or error}.", "Make room on the disk, or make the folder writable."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, so that an interruption leaves the old file and never half of the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_through(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk, so that what is then renamed into place is whole."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def unwritable(path: Path, error: OSError) -> KdxError:
    """The error of an export that its folder does not take."""
    return KdxError(f"{path} cannot be written: {error.strerror or error}.", "Choose a folder that you may write to, on a disk with room.")
