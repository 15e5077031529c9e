"""Results ahead of whoever takes them: computed by threads, in order, and never many at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD = 2
"""Jobs in work beyond the one that was taken last: with one alone, threads would idle while its last parts are done."""


@dataclass(frozen=True)
class Job(Generic[T]):
    """Parts that threads do in any order, and the result, to be asked for once all of them are done."""

    parts: Sequence[Callable[[], None]]
    result: Callable[[], T]


@contextmanager
def ahead(jobs: Iterable[Job[T]], workers: int, depth: int = AHEAD) -> Iterator[Iterator[T]]:
    """The jobs' results, in order, while ``workers`` threads do the parts of the next ``depth`` jobs.

    Each job is drawn from ``jobs`` as its work begins, so that what it holds is bounded too. With 0 workers a job is done when its
    result is asked for, by who asks. What a part raises is raised there as well. On leaving, parts that have not begun are dropped
    and the others waited for: no thread outlives the block.

    Threads, not processes: they suit parts that release the interpreter's lock, share memory, and end with their process.
    """
    if workers < 0 or depth < 1:
        raise ValueError(f"workers must be 0 or more, and depth 1 or more, not {workers} and {depth}")
    if workers == 0:
        yield (_done(job) for job in jobs)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="kdx-prefetch")
    try:
        yield _taken(iter(jobs), pool, depth)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _done(job: Job[T]) -> T:
    for part in job.parts:
        part()
    return job.result()


def _taken(jobs: Iterator[Job[T]], pool: ThreadPoolExecutor, depth: int) -> Iterator[T]:
    begun: deque[tuple[Job[T], list[Future[None]]]] = deque()

    def begin() -> None:
        job = next(jobs, None)
        if job is not None:
            begun.append((job, [pool.submit(part) for part in job.parts]))

    for _ in range(depth):
        begin()
    while begun:
        job, parts = begun.popleft()
        for part in parts:
            part.result()
        begin()
        yield job.result()
