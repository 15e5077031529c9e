"""OpenMP threads that wait without spinning while other processes need the cores.

An OpenMP thread that waits for its team spins first, for about 20 ms in libgomp. If the thread that it waits for has to wait for a core,
which another process or another team of this process occupies, the spinning takes the core that would end the wait. Every parallel
region of a millisecond then takes tens of milliseconds. PyTorch, MKL and oneDNN share one OpenMP runtime.

A user can choose in the environment, which the runtime reads once, when it is loaded. Otherwise `patient` decides while kdx computes. On a
machine with a core for every thread, spinning is faster, because a sleeping thread wakes up late: a run can take half as long.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from kdx.threads import WAITING, available_cores

KEPT_SECONDS = 60.0
"""How long `patient` stays prepared after its last block: on a crowded machine a new thread waits long for its first turn."""

RECENT_SECONDS = 1.0
"""How long an answer holds for a block that begins."""

INTERVAL = 0.05
"""Seconds between two answers to whether the machine is crowded."""

LOOK_SECONDS = 2e-3
"""How long other processes must need the cores, without interruption, for a machine to be crowded in the first look."""

CROWDED_SHARE = 0.15
"""A machine is crowded if the threads of this process wait for a core for at least this share of their time. Measured on two cores: at most
0.09 without other processes in 95 of 100 intervals, at least 0.19 beside one busy process and mostly 0.5 beside two."""

EVIDENCE_SECONDS = 5e-3
"""How long the threads must have run or waited in an interval for it to count."""

COUNTED = 6
"""How many intervals a share is that of. When threads wake up, they can wait for each other for one or two intervals."""


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

    On every machine some process runs for a moment, so they must want the cores for `LOOK_SECONDS`. A machine whose state is not known
    counts as crowded: the cores of a container or of an affinity, which unseen processes may share, and a system without /proc.
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


class Waits:
    """For how much of their time the threads of this process wait for a core, according to the system's scheduler."""

    def __init__(self, files: Path = Path("/proc")) -> None:
        self._files = files
        self._last = self._times()
        self._intervals: deque[tuple[int, int]] = deque(maxlen=COUNTED)  # nanoseconds in which they ran, and waited

    def share(self) -> float | None:
        """The share in the last `COUNTED` intervals between calls that count; None if the last one does not.

        The calling thread does not count. Raises OSError or ValueError if the system does not tell.
        """
        now, last = self._times(), self._last
        self._last = now
        if not now:
            raise OSError("no thread has times")
        run, waited = (sum(times[kind] - last.get(thread, (0, 0))[kind] for thread, times in now.items()) for kind in (0, 1))
        if run + waited < EVIDENCE_SECONDS * 1e9:
            return None
        self._intervals.append((run, waited))
        run, waited = map(sum, zip(*self._intervals, strict=True))
        return waited / (run + waited)

    def _times(self) -> dict[str, tuple[int, int]]:
        """Per thread the nanoseconds that it has run and that it has waited for a core."""
        times: dict[str, tuple[int, int]] = {}
        for task in (self._files / "self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                if task.name != str(threading.get_native_id()):
                    run, waited, _ = (task / "schedstat").read_text().split()
                    times[task.name] = int(run), int(waited)
        return times


class Watch:
    """Starts an idle team when the machine is crowded in a block, and ends it when the machine is quiet or no block runs any more.

    When a block begins, the threads of this process have not waited yet, so it looks at the other processes. Then a thread asks every
    `INTERVAL` how long the threads of this process have waited for a core. This answer is better: it is also right in a container, and in a
    process that has more threads than cores. A block that begins soon after an answer does not look again.
    """

    def __init__(self) -> None:
        self._blocks = 0
        self.forget()

    def forget(self) -> None:
        """Start again without threads, as in a forked child, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._team: _IdleTeam | None = None
        self._used = self._watching = False
        self._known = -math.inf

    @property
    def patient(self) -> bool:
        """Whether OpenMP's threads wait without spinning now."""
        return self._team is not None

    @property
    def watching(self) -> bool:
        """Whether the thread exists that asks again."""
        return self._watching

    @contextmanager
    def block(self, runtime: Any, team: int) -> Iterator[None]:
        with self._lock:
            self._blocks += 1
            self._used = True
            with suppress(RuntimeError):  # the system may allow no further thread; results are the same without these
                if self._team is None and time.monotonic() - self._known > RECENT_SECONDS:
                    if crowded(team):
                        self._team = _IdleTeam(runtime, partial(self._start_watch, runtime, team))
                    self._known = time.monotonic()
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
        last_used = time.monotonic()
        answers = _answers(team)
        while True:
            time.sleep(INTERVAL)
            is_crowded, now = next(answers), time.monotonic()
            with self._lock:
                last_used = now if self._used or self._blocks else last_used
                self._known = self._known if is_crowded is None else now
                self._used = False
                over = now - last_used > KEPT_SECONDS
                if self._team is None and is_crowded and self._blocks:
                    with suppress(RuntimeError):
                        self._team = _IdleTeam(runtime, lambda: None)
                elif self._team is not None and (over or is_crowded is False):
                    self._team.end()
                    self._team = None
                if over:
                    self._watching = False
                    return


def _answers(team: int) -> Iterator[bool | None]:
    """Whether the machine is crowded; None if the threads of this process have hardly wanted to run since the answer before."""
    with suppress(OSError, ValueError):
        waits = Waits()
        while True:
            share = waits.share()
            yield None if share is None else share > CROWDED_SHARE
    while True:
        yield crowded(team)


_WATCH = Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WATCH.forget)
