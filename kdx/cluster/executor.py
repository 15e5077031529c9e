"""The interface of everything that computes tasks in other processes, and its implementation with Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, Protocol

from kdx.cluster.options import ClusterOptions
from kdx.cluster.pool import Pool
from kdx.cluster.ray_crew import RayCrew, connected
from kdx.cluster.service import Build, Facts


class Executor(Protocol):
    """Computes tasks with services in other processes."""

    def results(
        self, build: Build, tasks: Sequence[Any], name: Callable[[Any], str], on_ready: Callable[[Facts], None]
    ) -> AbstractContextManager[Iterator[Any]]:
        """The results of all tasks, in any order, inside a block. All workers end with the block.

        build: makes a worker's service. tasks: hashable. name(task): its name in an error. on_ready(facts): called for each worker that
        is ready. A KdxError in a worker is raised unchanged.
        """


class RayExecutor:
    """Computes tasks with actors of Ray. uses_gpus: whether a worker gets a GPU, or a part of one, if the cluster has any."""

    def __init__(self, options: ClusterOptions, *, uses_gpus: bool) -> None:
        self._options = options
        self._uses_gpus = uses_gpus

    @contextmanager
    def results(
        self, build: Build, tasks: Sequence[Any], name: Callable[[Any], str], on_ready: Callable[[Facts], None]
    ) -> Iterator[Iterator[Any]]:
        if not tasks:
            yield iter(())
            return
        with connected(self._options) as ray:
            crew = RayCrew(ray, self._options, build, uses_gpus=self._uses_gpus)
            with closing(Pool(crew, name, on_ready).results(tasks)) as results:
                yield results
