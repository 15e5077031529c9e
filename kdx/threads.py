"""The processor cores that this process may use, and OpenMP threads that wait without spinning.

An OpenMP thread that waits for its team spins first, for about 20 ms in libgomp. If the thread that it waits for has to wait for a core,
which another process or another team of this process occupies, the spinning takes the core that would end the wait. Every parallel
region of a millisecond then takes tens of milliseconds. PyTorch, MKL and oneDNN share one OpenMP runtime.

A new process can choose in its environment, before the runtime is loaded (`set_environment`). The runtime never reads the environment
again, so code in a process that has loaded PyTorch already uses `patient`. The user's own setting wins in both. On a machine with a core
for every thread spinning is faster, because a sleeping thread wakes up late: a call of a few milliseconds can take half as long.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say how OpenMP's threads wait."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that say how many threads PyTorch uses."""

KEPT_SECONDS = 60.0
"""How long `patient` stays prepared after its last block: on a crowded machine a new thread waits long for its first turn."""

QUIET_SECONDS = 1.0
"""How long no other process must need the cores until threads spin again."""

INTERVAL = 0.05
"""Seconds between two looks at what other processes do."""

LOOK_SECONDS = 5e-4
"""How long other processes must need the cores, without interruption, for a machine to be crowded."""


# Cores


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


# Waiting


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
    """Set, for runtimes that are loaded later and for child processes, threads that do not spin, and their number ``limit`` if it is given.

    Variables that the user has set are left as they are.
    """
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    global _limit
    if limit is not None and not any(name in environment for name in COUNTS):
        environment[COUNTS[0]] = str(limit)
        _limit = str(limit) if environment is os.environ else _limit


@contextmanager
def patient(team: int) -> Iterator[None]:
    """Run a block in which OpenMP's threads, ``team`` of them, wait without spinning while the machine is `crowded`.

    That is as with OMP_WAIT_POLICY=PASSIVE, in a process that has loaded PyTorch. On a machine with a core for each thread, spinning is
    faster and stays. libgomp spins 100 times instead of 300,000 times while it manages more threads than there are cores ("GOMP_SPINCOUNT"
    in its manual), so a team of idle threads is kept as long as the machine is crowded, up to `KEPT_SECONDS` longer than the block. Intel's
    and LLVM's runtimes have a function for it, which is always used. Blocks may be nested, and several threads may be in one. Nothing
    happens if the user has set one of `WAITING`, or if no runtime is loaded globally.
    """
    runtime = None if team == 1 or any(name in os.environ for name in WAITING) else _runtime()
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
        with _WATCH.block(runtime, team):
            yield


def crowded(team: int, files: Path = Path("/proc")) -> bool:
    """Whether other processes want so many cores that fewer than ``team`` are left.

    On every machine some process runs for a moment, so they must want them for `LOOK_SECONDS`. What cannot be known counts as crowded: the
    cores of a container or of an affinity, which other processes share unseen, and a system that does not tell.
    """
    total = os.cpu_count() or 1
    if available_cores() < total:
        return True
    end = time.perf_counter() + LOOK_SECONDS  # no pause between the looks: on a crowded machine a thread that sleeps loses its core
    while _wanted_by_others(total - team, files):
        if time.perf_counter() > end:
            return True
    return False


def _wanted_by_others(free: int, files: Path) -> bool:
    """Whether more threads of other processes than ``free`` run or wait for a core at this moment."""
    try:
        running = int((files / "loadavg").read_text().split()[3].partition("/")[0])
        if 1 <= running <= free + 1:  # the calling thread is one of them
            return False
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in (files / "self/task").iterdir()]
    except (OSError, ValueError, IndexError):
        return True
    return running < 1 or running - states.count("R") > free


@cache
def _runtime() -> Any:
    """The OpenMP runtime that every library of the process sees, to which PyTorch adds its own; None if `patient` knows no way for it."""
    try:
        symbols = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such list
        return None
    return symbols if hasattr(symbols, "kmp_set_blocktime") or hasattr(symbols, "GOMP_parallel") else None


class _IdleTeam:
    """More OpenMP threads than cores, which never have work. They belong to one Python thread, and end with it."""

    def __init__(self, runtime: Any, then: Callable[[], None]) -> None:
        """Start them, and call ``then`` in their thread, for which nothing waits."""
        self._ready, self._over = threading.Event(), threading.Event()
        self._then = then
        threading.Thread(target=self._run, args=(runtime,), name="kdx-idle-team", daemon=True).start()
        self._ready.wait()

    def end(self) -> None:
        self._over.set()

    def _run(self, runtime: Any) -> None:
        # The function that the team runs only has to return. This one takes no argument and changes nothing.
        runtime.GOMP_parallel(runtime.omp_get_num_procs, None, runtime.omp_get_num_procs() + 1, 0)
        self._ready.set()
        self._then()
        self._over.wait()


class Watch:
    """Starts an idle team when the machine is crowded in a block, and ends it when the machine is quiet or no block runs any more.

    A block looks when it begins, and a thread looks again every `INTERVAL`.
    """

    def __init__(self) -> None:
        self._blocks = 0
        self.forget()

    def forget(self) -> None:
        """Start again without threads, as in a forked child, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._team: _IdleTeam | None = None
        self._used = self._watching = False
        self._looked = -math.inf

    @property
    def patient(self) -> bool:
        """Whether OpenMP's threads wait without spinning now."""
        return self._team is not None

    @property
    def watching(self) -> bool:
        """Whether the thread exists that looks again."""
        return self._watching

    @contextmanager
    def block(self, runtime: Any, team: int) -> Iterator[None]:
        with self._lock:
            self._blocks += 1
            self._used = True
            with suppress(RuntimeError):  # the system may allow no further thread; results are the same without these
                if self._team is None and time.monotonic() - self._looked > INTERVAL:
                    if crowded(team):
                        self._team = _IdleTeam(runtime, partial(self._start_watch, runtime, team))
                    self._looked = time.monotonic()
            if self._team is None:
                self._start_watch(runtime, team)
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1

    def _start_watch(self, runtime: Any, team: int) -> None:
        if not self._watching:
            self._watching = True
            try:
                threading.Thread(target=self._watch, args=(runtime, team), name="kdx-watch", daemon=True).start()
            except RuntimeError:
                self._watching = False

    def _watch(self, runtime: Any, team: int) -> None:
        last_crowded = last_used = time.monotonic()
        while True:
            time.sleep(INTERVAL)
            is_crowded, now = crowded(team), time.monotonic()
            with self._lock:
                last_crowded = now if is_crowded else last_crowded
                last_used = now if self._used or self._blocks else last_used
                self._used = False
                over = now - last_used > KEPT_SECONDS
                if self._team is None and is_crowded and self._blocks:
                    with suppress(RuntimeError):
                        self._team = _IdleTeam(runtime, lambda: None)
                elif self._team is not None and (over or now - last_crowded > QUIET_SECONDS):
                    self._team.end()
                    self._team = None
                if over:
                    self._watching = False
                    return


_WATCH = Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WATCH.forget)
