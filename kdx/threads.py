"""The processor cores that this process may use, and OpenMP threads that wait without spinning.

An OpenMP thread that waits for its team spins first, for about 20 ms in libgomp. If the thread that it waits for has to wait for a core,
which another process or another team of this process occupies, the spinning takes the core that would end the wait. Every parallel
region of a millisecond then takes tens of milliseconds. PyTorch, MKL and oneDNN share one OpenMP runtime.

A new process can choose in its environment, before the runtime is loaded (`set_environment`). The runtime never reads the environment
again, so code in a process that has loaded PyTorch already uses `patient`. The user's own setting wins in both.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say how OpenMP's threads wait."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that say how many threads PyTorch uses."""

KEPT_SECONDS = 1.0
"""How long `patient` lasts after its last block, so that a loop over short calls does not start the threads again in each of them."""


# Cores


def available_cores() -> int:
    """The number of processor cores that this process may use: those of its affinity, and at most the quotas of its control groups."""
    return quota() or _affinity()


@cache
def quota() -> int | None:
    """The number of cores that the control groups allow, if it is smaller than that of the affinity, which libraries respect themselves.

    A fraction of a core counts as a core. The number is read once; a limit that changes while the process runs is not noticed.
    """
    return smaller_quota(Path("/"), _affinity())


def smaller_quota(root: Path, affinity: int) -> int | None:
    """`quota`, not cached, with the control groups under the file system ``root``."""
    cores = quota_cores(root)
    return None if cores is None or math.ceil(cores) >= affinity else math.ceil(cores)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota_cores(root: Path) -> float | None:
    """The processor time per time that the control groups of this process allow, of version 1 and 2; None without a limit.

    A group is limited by its ancestors too, so the smallest quota counts. Files that do not exist or cannot be read limit nothing.
    """
    quotas = []
    for folder, top in _groups(_lines(root / "proc/self/cgroup"), _lines(root / "proc/self/mountinfo"), root):
        for group in (folder, *folder.parents):
            quotas.append(_quota(group))
            if group == top:
                break
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(memberships: list[str], mounts: list[str], root: Path) -> Iterator[tuple[Path, Path]]:
    """The folder of each group of this process that may limit its processor time, and the mount point above it."""
    paths: dict[bool, str] = {}  # whether the hierarchy is of version 2 -> the path of the group in it
    for line in memberships:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            paths[True] = path
        elif "cpu" in controllers.split(","):
            paths[False] = path
    for line in mounts:
        mount, _, system = line.partition(" - ")
        top, point = mount.split()[3:5]
        kind, _, options = system.split()[:3]
        version_2 = kind == "cgroup2"
        if version_2 not in paths or not (version_2 or (kind == "cgroup" and "cpu" in options.split(","))):
            continue
        # A container may see only its own part of the hierarchy, mounted from ``top``, or paths outside its namespace ("/..").
        group = PurePosixPath(paths[version_2])
        inside = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath(".")
        folder = root / point.replace("\\040", " ").lstrip("/")
        yield folder / "/".join(part for part in inside.parts if part not in ("/", "..")), folder


def _quota(group: Path) -> float | None:
    """The quota of one group in cores, without its ancestors."""
    lines = _lines(group / "cpu.max") or _lines(group / "cpu.cfs_quota_us") + _lines(group / "cpu.cfs_period_us")
    try:
        allowed, period = map(int, " ".join(lines).split())
    except ValueError:  # "max", or no such file
        return None
    return allowed / period if allowed > 0 and period > 0 else None  # version 1 writes -1 for no limit


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []


# Waiting


def set_environment(environment: MutableMapping[str, str], limit: int | None) -> None:
    """Set, for runtimes that are loaded later and for child processes, threads that do not spin, and their number ``limit`` if it is given.

    Variables that the user has set are left as they are.
    """
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if limit is not None and not any(name in environment for name in COUNTS):
        environment["OMP_NUM_THREADS"] = str(limit)


@contextmanager
def patient() -> Iterator[None]:
    """Run a block in which OpenMP's threads wait without spinning, as with OMP_WAIT_POLICY=PASSIVE, in a process that has loaded PyTorch.

    libgomp spins 100 times instead of 300,000 times while it manages more threads than there are cores ("GOMP_SPINCOUNT" in its manual),
    so a team of idle threads is kept, up to `KEPT_SECONDS` longer than the block. Intel's and LLVM's runtimes have a function for it.
    Blocks may be nested, and several threads may be in one. Nothing happens if the user has set one of `WAITING`, or if no runtime is
    loaded globally.
    """
    if any(name in os.environ for name in WAITING):
        yield
        return
    runtime = _runtime()
    if runtime is None:
        yield
    elif hasattr(runtime, "kmp_set_blocktime"):
        before = runtime.kmp_get_blocktime()
        runtime.kmp_set_blocktime(0)
        try:
            yield
        finally:
            runtime.kmp_set_blocktime(before)
    else:
        with _TEAM.kept(runtime):
            yield


@cache
def _runtime() -> Any:
    """The OpenMP runtime that every library of the process sees, to which PyTorch adds its own; None if `patient` knows no way for it."""
    try:
        symbols = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such list
        return None
    return symbols if hasattr(symbols, "kmp_set_blocktime") or hasattr(symbols, "GOMP_parallel") else None


class IdleTeam:
    """More OpenMP threads than cores, which never have work. They belong to one Python thread, and end with it."""

    def __init__(self) -> None:
        self._blocks = 0
        self.forget()

    def forget(self) -> None:
        """Start again without a team, as in a forked child, which has none of its parent's threads."""
        self._changed = threading.Condition()
        self._ready = threading.Event()
        self._used = self._running = False

    @property
    def running(self) -> bool:
        """Whether the team exists."""
        return self._running

    @contextmanager
    def kept(self, runtime: Any) -> Iterator[None]:
        """Run a block while the team exists."""
        with self._changed:
            self._blocks += 1
            self._used = True
            if not self._running:
                self._ready.clear()
                try:
                    threading.Thread(target=self._run, args=(runtime,), name="kdx-idle-team", daemon=True).start()
                    self._running = True
                except RuntimeError:  # the system allows no further thread; results are the same without the team
                    self._ready.set()
        self._ready.wait()
        try:
            yield
        finally:
            with self._changed:
                self._blocks -= 1

    def _run(self, runtime: Any) -> None:
        # The function that the team runs only has to return. This one takes no argument and changes nothing.
        runtime.GOMP_parallel(runtime.omp_get_num_procs, None, runtime.omp_get_num_procs() + 1, 0)
        self._ready.set()
        with self._changed:
            while self._blocks or self._used:
                self._used = False
                self._changed.wait(KEPT_SECONDS)
            self._running = False


_TEAM = IdleTeam()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TEAM.forget)
