"""Bounded, ordered prefetching on a thread pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

PREFETCH_DEPTH = 2
"""Jobs that are computed beyond the one whose result was taken last. With one job, threads would idle while its last tasks finish."""


@dataclass(frozen=True)
class Job(Generic[T]):
    """Tasks that threads run in any order, and a function that returns the result once all of them are done."""

    tasks: Sequence[Callable[[], None]]
    result: Callable[[], T]


@contextmanager
def prefetch(jobs: Iterable[Job[T]], workers: int, depth: int = PREFETCH_DEPTH) -> Iterator[Iterator[T]]:
    """The results of the jobs, in order, while ``workers`` threads run the tasks of the next ``depth`` jobs.

    Each job is drawn from ``jobs`` when its tasks start, so the memory of the jobs is bounded too. With 0 workers, the thread that
    takes a result runs its job at that moment. An exception in a task is raised where its result is taken. The block's end cancels
    tasks that have not started and waits for those that run. Then the threads end.

    These are threads and not processes: the tasks release the interpreter's lock, threads share memory, and they end with their process.

    Raises ValueError for a negative number of workers and for a depth below 1.
    """
    if workers < 0 or depth < 1:
        raise ValueError(f"workers must be 0 or more, and depth 1 or more, not {workers} and {depth}")
    if workers == 0:
        yield (_run(job) for job in jobs)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="kdx-prefetch")
    try:
        yield _prefetched(iter(jobs), pool, depth)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(job: Job[T]) -> T:
    for task in job.tasks:
        task()
    return job.result()


def _prefetched(jobs: Iterator[Job[T]], pool: ThreadPoolExecutor, depth: int) -> Iterator[T]:
    started: deque[tuple[Job[T], list[Future[None]]]] = deque()

    def start_next() -> None:
        job = next(jobs, None)
        if job is not None:
            started.append((job, [pool.submit(task) for task in job.tasks]))

    for _ in range(depth):
        start_next()
    while started:
        job, futures = started.popleft()
        for future in futures:
            future.result()
        start_next()
        yield job.result()
