"""The processes that ``torchrun`` started, as workers: process r computes the tasks r, r + world, r + 2 world and so on.

All processes compute the same round of tasks. If one ends, torchrun ends the others, and the same command resumes the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from kdx import threads
from kdx.cluster.service import Build, Facts, Service, described
from kdx.errors import KdxError

_PATIENCE = timedelta(days=30)
"""How long a process waits for the first one, which can measure layers during that time."""


def count() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


class ProcessExecutor:
    """Computes tasks in all processes. The first process uses it, and the others run `serve`."""

    @contextmanager
    def results(
        self, build: Build, tasks: Sequence[Any], name: Callable[[Any], str], on_ready: Callable[[Facts], None]
    ) -> Iterator[Iterator[Any]]:
        """As `kdx.cluster.executor.Executor`. Results arrive in order."""
        if not tasks:
            yield iter(())
            return
        _agree((build, tasks))
        part = _Part(build, tasks)
        results = self._rounds(part, on_ready)
        try:
            yield results
        finally:
            results.close()

    def _rounds(self, part: _Part, on_ready: Callable[[Facts], None]) -> Any:
        going = True
        try:
            for facts in _values(_gather(part.prepare())):
                on_ready(facts)
            for _ in range(part.rounds):
                _agree(True)
                values = _gather(part.next())
                yield from (value for value in _values(values) if value is not None)
            going = False
            _agree(False)
        finally:
            if going:
                with suppress(RuntimeError):  # another process has ended
                    _agree(False)
            part.close()


@contextmanager
def connected() -> Iterator[None]:
    """Inside the block, the processes of torchrun can exchange objects. At its end the first one tells the others to end."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        if torch.distributed.get_rank() == 0:
            with suppress(RuntimeError):
                _agree(None)
        torch.distributed.destroy_process_group()


def serve() -> None:
    """Compute the tasks of this process, until the first one ends."""
    while (work := _agree(None)) is not None:
        part = _Part(*work)
        _gather(part.prepare())
        while _agree(None):
            _gather(part.next())
        part.close()


class _Part:
    """The tasks of this process. A KdxError is a value, which the first process raises."""

    def __init__(self, build: Build, tasks: Sequence[Any]) -> None:
        import torch

        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.rounds = -(-len(tasks) // world)
        self._build = build
        self._tasks = tasks[rank::world]
        self._service: Service | None = None
        self._results: Iterator[Any] = iter(())

    def prepare(self) -> Facts | KdxError:
        import torch

        try:
            self._service = self._build()
        except KdxError as error:
            return error
        self._results = self._service.results(self._tasks)
        return described(self._service, threads.chosen() or torch.get_num_threads())

    def next(self) -> Any:
        """The next result; None after the last one."""
        try:
            return next(self._results, None)
        except KdxError as error:
            return error

    def close(self) -> None:
        if self._service is not None:
            self._service.close()


def _values(values: Sequence[Any]) -> Sequence[Any]:
    """The values, if none is an error. Raises the first error."""
    for value in values:
        if isinstance(value, KdxError):
            raise value
    return values


def _agree(value: Any) -> Any:
    """The first process's value, in each process."""
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def _gather(value: Any) -> list[Any]:
    """The values of all processes in the first one, in order; nothing in the others."""
    import torch

    values: list[Any] | None = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(value, values)
    return values or []
