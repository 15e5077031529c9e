"""Processes that do the jobs of a study. Each ends with the process that started it, even if that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kdx.study.attempts import Outcome, Perform, attempt
from kdx.study.grid import Job
from kdx.threads import COUNTS

_CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class _Worker:
    process: Any
    connection: Any
    job: Job | None = None


@dataclass
class Workers:
    """``count`` processes with ``threads`` threads each. A context manager; at its end they are killed, because every job resumes."""

    count: int
    perform: Perform
    folder: Path
    threads: int
    _workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    @property
    def busy(self) -> bool:
        return any(worker.job is not None for worker in self._workers)

    @property
    def free(self) -> int:
        """How many jobs can be started now."""
        return self.count - sum(worker.job is not None for worker in self._workers)

    def start(self, job: Job) -> None:
        for worker in [worker for worker in self._workers if worker.job is None]:
            try:
                worker.connection.send(job)
            except OSError:  # the process was killed while it had no job
                self._workers.remove(worker)
                worker.process.join()
                continue
            worker.job = job
            return
        worker = self._new()
        worker.connection.send(job)
        worker.job = job

    def wait(self, on_note: Callable[[Job, str], None]) -> Iterator[Outcome]:
        """Wait for a message of a process; yield the outcomes of the jobs that have ended. Without a running job, return at once."""
        running = [worker for worker in self._workers if worker.job is not None]
        ready = connection.wait([worker.connection for worker in running]) if running else []
        for worker in running:
            if worker.connection not in ready or worker.job is None:
                continue
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._workers.remove(worker)
                worker.process.join()
                code = worker.process.exitcode
                ended = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
                yield Outcome(worker.job, 0.0, f"Its process ended {ended}.", "If memory ran out, choose fewer --workers.", True)
                continue
            if isinstance(message, str):
                on_note(worker.job, message)
            else:
                worker.job = None
                yield message

    def _new(self) -> _Worker:
        ours, theirs = _CONTEXT.Pipe()
        before = {name: os.environ.get(name) for name in COUNTS}
        os.environ.update(dict.fromkeys(COUNTS, str(self.threads)))  # read before the process loads PyTorch
        try:
            process = _CONTEXT.Process(target=_serve, args=(theirs, self.perform, self.folder), daemon=True)
            with _hidden_main(), _blocked_ctrl_c():
                process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Inside the block, new processes do not import the main module, which may be a script that would start the study once more."""
    main = sys.modules["__main__"]
    before = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    main.__spec__ = None
    if "__file__" in before:
        del main.__file__
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(main, name, value)


@contextmanager
def _blocked_ctrl_c() -> Iterator[None]:
    """Inside the block, new processes start with SIGINT blocked.

    A terminal sends Ctrl-C to these processes too. A process needs seconds to reach `_serve`, and until then it would print a traceback.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # otherwise the first process starts it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Any, perform: Perform, folder: Path) -> None:
    """Do the jobs that come from the connection, in a process of its own. Ctrl-C is left to the first process, which kills this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # for processes that this one may start
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(attempt(job, perform, folder, connection.send))


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
