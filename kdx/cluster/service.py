"""The service that a worker runs, and the worker itself. PyTorch is imported only after the number of threads is known."""

from __future__ import annotations

import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from kdx import threads

Facts = Mapping[str, Any]
"""A worker's description of itself, for the manifest."""


class Service(Protocol):
    """Computes tasks in a worker. It is built once, from arguments that are sent to the worker."""

    @property
    def facts(self) -> Facts:
        """Everything that results depend on besides the tasks, for example the runtime. It must be the same in all workers."""

    def results(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """The result of each task, in order."""

    def close(self) -> None:
        """Free the resources of the service."""


Build = Callable[[], Service]
"""Builds a service. It is pickled, so it is a function of a module or an object of a class with ``__call__``."""


@dataclass(frozen=True)
class Surroundings:
    """The settings that a worker adopts from the driver: number of threads, current folder and folders of Python modules."""

    threads: int
    folder: str
    modules: tuple[str, ...]

    @classmethod
    def here(cls, threads: int) -> Surroundings:
        return cls(threads, str(Path.cwd()), tuple(sys.path))

    def enter(self) -> None:
        """Prepare this process, best before PyTorch is imported, so that the threads of other libraries are limited too."""
        os.environ.update(dict.fromkeys(threads.COUNTS, str(self.threads)))
        threads.set_environment(os.environ, threads.quota())
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self.threads)
        with suppress(OSError):  # another machine may not have the folder; then errors name the relative paths that do not exist
            os.chdir(self.folder)
        sys.path += [folder for folder in self.modules if folder not in sys.path]


def described(service: Service, threads: int) -> Facts:
    """The facts of a service in this process: its host, its process, and under ``same`` what must be the same in all workers."""
    same = {"kdx": version("kdx"), "torch": version("torch"), "threads": threads, **service.facts}
    return {"host": platform.node(), "pid": os.getpid(), "same": same}


class Worker:
    """A process with a service. Each call of `step` returns one result, so the driver decides how many are in memory."""

    def __init__(self, build: bytes, surroundings: Surroundings) -> None:
        """build: a pickled `Build`, which is not unpickled before `prepare`, because that imports PyTorch."""
        self._build = build
        self._surroundings = surroundings
        self._service: Service | None = None
        self._results: Iterator[Any] = iter(())

    def prepare(self) -> Facts:
        """Build the service. Returns its facts and those of this process."""
        self._surroundings.enter()
        build: Build = pickle.loads(self._build)  # from the driver, which starts this process
        self._service = build()
        return described(self._service, self._surroundings.threads)

    def step(self, tasks: Sequence[Any]) -> Any:
        """Start with new tasks if there are any, and return the next result."""
        assert self._service is not None
        if tasks:
            self._results = self._service.results(tasks)
        return next(self._results)

    def close(self) -> None:
        if self._service is not None:
            self._service.close()
