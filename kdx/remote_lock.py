"""A lock at a URL: an object that its owner creates, renews and deletes, because object stores cannot lock files."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kdx.errors import KdxError
from kdx.remote import RemotePath

log = logging.getLogger("kdx")

RENEWED_EVERY = 15.0
"""The seconds between two renewals of a lock."""

ABANDONED_AFTER = 60.0
"""The seconds without a renewal after which the owner of a lock counts as dead."""

SETTLED_AFTER = 1.0
"""The seconds after which every process that saw an old lock has tried to replace it."""


class RemoteLock:
    """A lock object, with its owner and the time of its last renewal. A context manager; `close` deletes the object.

    A conditional write creates the object, and the service lets only one succeed. If the owner of a lock has ended, another process takes
    the lock over: at once on the same machine, otherwise after `ABANDONED_AFTER` seconds without a renewal. The waiting machine's clock
    measures these seconds; the times in the object do not matter. A process that was only suspended for so long loses its lock: `check`
    raises KdxError from its next renewal on. Until then both may write, so a run's files must depend on its configuration alone.
    """

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._owner = {"machine": _machine(), "process": os.getpid(), "lock": uuid.uuid4().hex}
        self._is_lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="kdx-lock", daemon=True)

    @classmethod
    def acquire(cls, path: RemotePath) -> Self:
        """The lock ``path``. Raises BlockingIOError if another process has it."""
        lock, took_over = cls(path), False
        while True:
            try:
                path.create(lock._content())
            except FileExistsError:
                old = _wait_for(path)
                if _read(path) == old:
                    path.unlink(missing_ok=True)
                    took_over = True
                continue
            if took_over:  # another process may have read the old lock too, and then deleted the new one
                time.sleep(SETTLED_AFTER)
                if not lock._is_own(_read(path)):
                    raise BlockingIOError(0, "Another process has the lock")
            lock._thread.start()
            return lock

    def check(self) -> None:
        """Raise KdxError if another process has taken the lock."""
        if self._is_lost:
            raise KdxError(
                f"Another process has taken over {self._path.parent}, because this one did not renew its lock for {ABANDONED_AFTER:.0f} s.",
                "Let the other process finish, or stop it and run the same command again.",
            )

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            with suppress(OSError, KdxError):  # a lock that is not deleted is taken over later
                if self._is_own(_read(self._path)):
                    self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def _renew(self) -> None:
        while not self._closed.wait(RENEWED_EVERY):
            with suppress(OSError, KdxError):  # a lost connection: the next renewal may succeed
                if not self._is_own(_read(self._path)):
                    self._is_lost = True
                    return
                self._path.write_bytes(self._content())

    def _is_own(self, content: dict[str, Any]) -> bool:
        return content.get("lock") == self._owner["lock"]

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "renewed": datetime.now(UTC).isoformat()}).encode()


def _wait_for(path: RemotePath) -> dict[str, Any]:
    """Return when the lock's owner has ended or released it: the content then. Raises BlockingIOError if the owner renews the lock."""
    first, end = _read(path), time.monotonic() + ABANDONED_AFTER
    if _has_ended(first):
        return first
    log.warning(
        "%s is locked by process %s on %s; checking whether it still runs.", path.parent, first.get("process"), first.get("machine")
    )
    while time.monotonic() < end:
        time.sleep(min(1.0, ABANDONED_AFTER / 10))
        current = _read(path)
        if not current:
            return current
        if current != first:
            raise BlockingIOError(0, "Another process has the lock")
    return first


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock is known to have ended: it was on this machine, and its process does not exist any more."""
    if not owner:
        return True
    if owner.get("machine") != _machine() or not isinstance(process := owner.get("process"), int):
        return False
    if sys.platform == "win32":  # there, signal 0 is Ctrl-C
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _read(path: RemotePath) -> dict[str, Any]:
    """The content of a lock; empty if there is none, or if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _machine() -> str:
    """A text that identifies this machine, its boot and its container."""
    facts = [socket.gethostname(), f"{uuid.getnode():x}"]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(facts)
