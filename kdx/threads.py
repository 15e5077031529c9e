"""The processor cores that this process may use, and what a new process is told about its threads."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say how OpenMP's threads wait."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that say how many threads PyTorch uses."""


def available_cores() -> int:
    """The number of processor cores that this process may use: those of its affinity, and at most the quotas of its control groups."""
    return quota() or _affinity()


def chosen() -> int | None:
    """The number of threads that the user, or the parent process, chose for this process (OMP_NUM_THREADS); None without one.

    A limit that `set_environment` has set is no choice.
    """
    text = os.environ.get(COUNTS[0], "").partition(",")[0].strip()  # a list has a number per level of nesting
    return int(text) if text.isdecimal() and int(text) and text != _limit else None


_limit: str | None = None
"""The OMP_NUM_THREADS that `set_environment` has set in this process."""


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


@contextmanager
def short_turns() -> Iterator[None]:
    """Run a block in which a thread that waits for Python's lock gets it after 0.2 ms, in place of 5 ms.

    A thread that launches the work of a GPU releases the lock for every operation. If other threads compute in Python meanwhile, it would
    wait up to 5 ms each time, and the GPU would wait for it. The setting applies to the whole process.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def set_environment(environment: MutableMapping[str, str], limit: int | None) -> None:
    """Set the number of threads, ``limit``, for runtimes that are loaded later and for child processes. None sets nothing.

    Variables that the user has set are left as they are.
    """
    global _limit
    if limit is not None and not any(name in environment for name in COUNTS):
        environment[COUNTS[0]] = str(limit)
        _limit = str(limit) if environment is os.environ else _limit
