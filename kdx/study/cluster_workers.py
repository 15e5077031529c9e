"""Workers of a Ray cluster that do the jobs of a study. All machines need the study's folder at the same path."""

from __future__ import annotations

import pickle
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kdx.cluster.options import ClusterOptions
from kdx.cluster.pool import WorkerEnded
from kdx.cluster.ray_crew import Connection, connected, size_of
from kdx.cluster.service import Surroundings
from kdx.study.attempts import Outcome, Perform, attempt
from kdx.study.grid import Job


class JobWorker:
    """Does jobs, in a process of its own. `run` and `message` are called at the same time."""

    def __init__(self, perform: bytes, folder: Path, surroundings: Surroundings) -> None:
        """perform: a pickled `Perform`."""
        surroundings.enter()
        self._perform: Perform = pickle.loads(perform)
        self._folder = folder
        self._messages = queue.SimpleQueue[str | Outcome]()

    def run(self, job: Job) -> None:
        """Do a job. Its notes and its outcome become messages."""
        self._messages.put(attempt(job, self._perform, self._folder, self._messages.put))

    def message(self) -> str | Outcome:
        """The next message."""
        return self._messages.get()


@dataclass
class _Worker:
    actor: Any
    job: Job | None = None
    reply: Any = None


class ClusterWorkers:
    """The same interface as `kdx.study.workers.Workers`, with actors of Ray. threads: the threads and cores of each."""

    def __init__(self, options: ClusterOptions, perform: Perform, folder: Path, threads: int, *, uses_gpus: bool) -> None:
        self._options = replace(options, cpus_per_worker=threads)
        self._arguments = pickle.dumps(perform), Path.cwd() / folder, Surroundings.here(threads)
        self._uses_gpus = uses_gpus
        self._workers: list[_Worker] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._ray = stack.enter_context(connected(self._options))
            self._connection = Connection(self._ray)
            self._size = size_of(self._ray, self._options, self._uses_gpus)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        with self._stack:
            for worker in self._workers:
                with suppress(self._ray.exceptions.RayError, ConnectionError):  # the error of the block is the one to show
                    self._ray.kill(worker.actor)

    @property
    def busy(self) -> bool:
        return any(worker.job is not None for worker in self._workers)

    @property
    def free(self) -> int:
        """How many jobs can be started now."""
        return self._size.count - sum(worker.job is not None for worker in self._workers)

    def start(self, job: Job) -> None:
        worker = next((worker for worker in self._workers if worker.job is None), None) or self._new()
        worker.job = job
        worker.actor.run.remote(job)
        worker.reply = worker.actor.message.remote()

    def wait(self, on_note: Callable[[Job, str], None]) -> Iterator[Outcome]:
        """Wait for a message of a worker; yield the outcomes of the jobs that have ended. Without a running job, return at once."""
        running = {worker.reply: worker for worker in self._workers if worker.job is not None}
        for reply in self._connection.wait(list(running)) if running else []:
            worker = running[reply]
            assert worker.job is not None
            try:
                message = self._connection.result(reply)
            except WorkerEnded as error:
                self._workers.remove(worker)
                yield Outcome(worker.job, 0.0, f"Its worker ended: {error}.", "If memory ran out, start fewer workers.", True)
                continue
            if isinstance(message, str):
                worker.reply = worker.actor.message.remote()
                on_note(worker.job, message)
            else:
                worker.job = None
                yield message

    def _new(self) -> _Worker:
        actor = self._ray.remote(JobWorker).options(num_cpus=self._size.cpus, num_gpus=self._size.gpus, max_restarts=0, max_concurrency=2)
        self._workers.append(_Worker(actor.remote(*self._arguments)))
        return self._workers[-1]
