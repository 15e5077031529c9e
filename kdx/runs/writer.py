"""Writes results in a thread while the next batch is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

Write = Callable[[], None]

DEPTH = 2
"""The largest number of writes that wait or run while the caller continues. Their data stay in memory."""


@contextmanager
def writing(depth: int = DEPTH) -> Iterator[Callable[[Write], None]]:
    """``submit(write)``: runs writes in one thread, in order, while the caller continues. It waits while ``depth`` writes are not done.

    After a write that raises, no later one is run; the exception is raised by a later ``submit`` or at the end of the block. At the end of
    the block, also after an exception of the caller, all writes before a failed one are complete, and the thread has ended.
    """
    pending: deque[Future[None]] = deque()
    failed = False

    def run(write: Write) -> None:
        nonlocal failed
        if failed:
            return
        try:
            write()
        except BaseException:
            failed = True
            raise

    def submit(write: Write) -> None:
        while len(pending) >= depth:
            pending.popleft().result()
        pending.append(pool.submit(run, write))

    with ThreadPoolExecutor(1, thread_name_prefix="kdx-write") as pool:
        yield submit
        for future in pending:
            future.result()
