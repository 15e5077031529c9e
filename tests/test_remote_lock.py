"""Locks at URLs: only one process has a lock, an owner that has ended loses it, and a running one keeps it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kdx import remote_lock
from kdx.errors import KdxError
from kdx.remote import RemotePath, as_path
from kdx.remote_lock import RemoteLock


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemotePath]:
    """A lock that is renewed every 0.05 s and abandoned after 0.5 s."""
    monkeypatch.setattr(remote_lock, "RENEWED_EVERY", 0.05)
    monkeypatch.setattr(remote_lock, "ABANDONED_AFTER", 0.5)
    monkeypatch.setattr(remote_lock, "SETTLED_AFTER", 0.1)
    lock = as_path("memory://locks/run") / ".lock"
    assert isinstance(lock, RemotePath)
    yield lock
    lock.unlink(missing_ok=True)


def owner(path: RemotePath) -> dict[str, object]:
    return dict(json.loads(path.read_bytes()))


def abandoned(path: RemotePath, **changes: object) -> None:
    """Write the lock of a process on another machine, which does not renew it."""
    content = {"machine": "another", "process": os.getpid(), "lock": "0", "renewed": "2999-01-01T00:00:00+00:00"} | changes
    path.write_bytes(json.dumps(content).encode())


def test_a_renewed_lock_is_refused(path: RemotePath) -> None:
    with RemoteLock.acquire(path) as lock:
        with pytest.raises(BlockingIOError):
            RemoteLock.acquire(path)
        lock.check()
    assert not path.exists()
    RemoteLock.acquire(path).close()


def test_a_lock_that_is_not_renewed_is_taken_over_whatever_its_clock_says(path: RemotePath) -> None:
    abandoned(path)
    start = time.monotonic()
    with RemoteLock.acquire(path):
        assert 0.4 < time.monotonic() - start < 5
        assert owner(path)["process"] == os.getpid() and owner(path)["machine"] != "another"


def test_the_lock_of_a_process_that_has_ended_on_this_machine_is_taken_over_at_once(path: RemotePath) -> None:
    process = os.posix_spawn("/bin/true", ["true"], os.environ) if hasattr(os, "posix_spawn") else pytest.skip("needs POSIX")
    os.waitpid(process, 0)
    abandoned(path, machine=remote_lock._machine(), process=process)
    start = time.monotonic()
    with RemoteLock.acquire(path):
        assert time.monotonic() - start < 0.3


def test_of_processes_that_see_the_same_old_lock_one_gets_it(path: RemotePath) -> None:
    abandoned(path)

    def acquired(_: int) -> RemoteLock | None:
        try:
            return RemoteLock.acquire(path)
        except BlockingIOError:
            return None

    with ThreadPoolExecutor(6) as pool:
        locks = [lock for lock in pool.map(acquired, range(6)) if lock is not None]
    assert len(locks) == 1
    locks[0].check()
    locks[0].close()


def test_a_process_whose_new_lock_is_replaced_at_once_does_not_start(path: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process had read the old lock before, and deleted the new one in its place."""
    abandoned(path)
    create = RemotePath.create

    def replaced(self: RemotePath, content: bytes) -> None:
        create(self, content)
        abandoned(self, machine="a third")

    monkeypatch.setattr(RemotePath, "create", replaced)
    with pytest.raises(BlockingIOError):
        RemoteLock.acquire(path)
    assert owner(path)["machine"] == "a third"


def test_windows_gets_no_signal_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """There os.kill(process, 0) is Ctrl-C for the owner of the lock."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
    assert not remote_lock._has_ended({"machine": remote_lock._machine(), "process": os.getpid()})


def test_a_damaged_lock_is_replaced(path: RemotePath) -> None:
    path.write_bytes(b"{")
    RemoteLock.acquire(path).close()


def test_a_process_that_lost_its_lock_stops_and_leaves_the_other_s(path: RemotePath) -> None:
    lock = RemoteLock.acquire(path)
    abandoned(path)
    time.sleep(0.3)
    with pytest.raises(KdxError, match="has taken over memory://locks/run"):
        lock.check()
    lock.close()
    assert owner(path)["machine"] == "another"
