"""Distributes tasks to workers, bounds the results in memory, and repeats the tasks of a worker that ends."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from kdx.cluster.service import Facts
from kdx.errors import KdxError

DEPTH = 2
"""The most results per worker that are being computed, or that were computed and not yet taken by the driver."""

MOST_DEATHS = 3
"""The number of workers that end at the same task, or before they are ready, at which the work stops."""

CHUNK = 8
"""The most tasks that a worker receives together. The worker prefetches among them. If it ends, other workers
compute the rest."""


class WorkerEnded(Exception):
    """The process of a worker has ended, or its machine cannot be reached."""


class Member(Protocol):
    """A worker, as the driver sees it. Each call returns a reply, which `Crew.wait` waits for and `Crew.result` reads."""

    def prepare(self) -> Any: ...
    def step(self, tasks: Sequence[Any]) -> Any: ...
    def close(self) -> Any:
        """Let the worker free its resources."""

    def stop(self) -> None:
        """End the worker now. It may have ended already."""


class Crew(Protocol):
    """Starts workers and waits for them."""

    @property
    def count(self) -> int:
        """How many workers run at once."""

    def start(self) -> Member: ...

    def wait(self, replies: Sequence[Any]) -> list[Any]:
        """Those of the replies that have arrived, at least one. Raises KdxError if none can arrive any more."""

    def result(self, reply: Any) -> Any:
        """The value of a reply. Raises WorkerEnded, or the exception that the worker raised."""

    def close(self, members: Sequence[Member]) -> None:
        """Let workers without tasks free their resources, for a few seconds at most."""


@dataclass(eq=False)
class _Working:
    """A worker with its tasks in order. requested: how many of their results were requested. preparing: whether it is not ready yet."""

    member: Member
    preparing: bool = True
    tasks: deque[Any] = field(default_factory=deque)
    requested: int = 0
    replies: deque[Any] = field(default_factory=deque)


class Pool:
    """Computes tasks with a crew. on_ready(facts) is called for each worker that is ready, and may raise KdxError.

    name(task): the name of a task in an error, such as "batch 7".
    """

    def __init__(self, crew: Crew, name: Callable[[Any], str], on_ready: Callable[[Facts], None] = lambda facts: None) -> None:
        self._crew = crew
        self._name = name
        self._on_ready = on_ready
        self._deaths = Counter[Any]()
        self._working: list[_Working] = []
        self._queue: deque[Any] = deque()

    def results(self, tasks: Sequence[Any]) -> Generator[Any, None, None]:
        """The result of every task, as soon as it arrives. All workers have ended when the generator is closed.

        Raises the KdxError of a worker, and KdxError if three workers end at the same task. At most DEPTH results per worker wait for the
        caller.
        """
        self._queue.extend(tasks)
        try:
            self._working += [self._start() for _ in range(min(self._crew.count, len(tasks)))]
            while self._queue or any(working.tasks for working in self._working):
                for working in self._working:
                    self._request(working)
                waited = {id(working.replies[0]): working for working in self._working if working.replies}
                for reply in self._crew.wait([working.replies[0] for working in waited.values()]):
                    working = waited[id(reply)]
                    working.replies.popleft()
                    try:
                        value = self._crew.result(reply)
                    except WorkerEnded as error:
                        self._replace(working, error)
                        continue
                    if working.preparing:
                        working.preparing = False
                        self._deaths.pop(None, None)
                        self._on_ready(value)
                    else:
                        working.tasks.popleft()
                        working.requested -= 1
                        yield value
            self._crew.close([working.member for working in self._working if not working.preparing])
        finally:
            for working in self._working:
                with suppress(Exception):  # the connection may be what failed
                    working.member.stop()

    def _start(self) -> _Working:
        member = self._crew.start()
        return _Working(member, replies=deque([member.prepare()]))

    def _request(self, working: _Working) -> None:
        """Ask a worker for results, up to DEPTH, and give it new tasks after its last ones."""
        if working.preparing:
            return
        while working.requested < DEPTH:
            chunk: list[Any] = []
            if working.requested == len(working.tasks):
                # Small parts near the end, so that no worker computes many tasks while the others have none.
                size = min(CHUNK, max(1, len(self._queue) // (2 * self._crew.count)), len(self._queue))
                if not size:
                    return
                chunk = [self._queue.popleft() for _ in range(size)]
                working.tasks += chunk
            working.replies.append(working.member.step(chunk))
            working.requested += 1

    def _replace(self, working: _Working, error: WorkerEnded) -> None:
        """Return the tasks of a worker that has ended to the queue, and start another in its place."""
        first = None if working.preparing else working.tasks[0]
        self._deaths[first] += 1
        if self._deaths[first] == MOST_DEATHS:
            where = "before they were ready" if working.preparing else f"at {self._name(first)}"
            raise KdxError(
                f"{MOST_DEATHS} workers ended {where}: {error}",
                "If memory ran out, start fewer workers (a larger --cpus-per-worker) or give a smaller --chunk; the same command resumes.",
            )
        self._queue.extendleft(reversed(working.tasks))
        with suppress(Exception):
            working.member.stop()
        self._working[self._working.index(working)] = self._start()
