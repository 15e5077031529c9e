"""A run in several processes: the arguments from which a worker makes its own plan and networks, and its computations with them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kdx import threads
from kdx.cluster.executor import Executor
from kdx.cluster.service import Facts
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.runs.batches import BatchResult, LocalBatches
from kdx.runs.plan import Plan, RunOptions, aligned
from kdx.runs.store import Store
from kdx.runs.whole import LocalPasses, Part, PartResult

GeometryKind = Literal["batch", "reference", "whole"]


@dataclass(frozen=True)
class RunArguments:
    """The arguments from which a worker makes the plan and the networks of a run.

    size: of the images. runtime: the one that the driver chose. fingerprint, hashes: of the data and of each role's weights, which must be
    the same on the worker's machine. geometry: tasks are the numbers of batches, or for ``whole`` parts of the images.
    """

    data: str
    models: Path
    layers: tuple[str, ...]
    options: RunOptions
    size: tuple[int, int]
    runtime: str
    fingerprint: str
    hashes: Mapping[str, str]
    geometry: GeometryKind

    @classmethod
    def of(
        cls, plan: Plan, layers: Sequence[str], size: tuple[int, int], runtime: str, hashes: Mapping[str, str], geometry: GeometryKind
    ) -> RunArguments:
        models = Path.cwd() / plan.models.path
        # Ray shows each worker its own GPU, as the first one.
        options = replace(plan.options, device="cuda") if plan.options.device.startswith("cuda") else plan.options
        return cls(plan.data, models, tuple(layers), options, size, runtime, plan.dataset.fingerprint, hashes, geometry)

    def __call__(self) -> RunService:
        """Raises KdxError if the data or the weights differ from the driver's."""
        options = self.options if self.options.workers is not None else replace(self.options, workers=threads.chosen())
        plan = Plan.of(self.data, self.models, self.layers, options)
        if plan.dataset.fingerprint != self.fingerprint:
            raise _different(f"The data of {self.data}")
        explainer = plan.explainer(None, lambda line: None)
        for role, record in explainer.networks().items():
            if record.sha256 != self.hashes[role]:
                raise _different(f"The {role}'s weights")
        explainer.open(self.size, len(plan.indices), runtime=self.runtime, batch=aligned(options.batch))
        return RunService(explainer, plan, self.size, self.geometry)


def _different(thing: str) -> KdxError:
    return KdxError(
        f"{thing} on {socket.gethostname()} differ from those of the driver.",
        "Provide the same files at the same paths on all machines, and name weights for every network, because random weights differ.",
    )


class RunService:
    """Computes batches, or parts of the images for the geometry ``whole``, in a worker."""

    def __init__(self, explainer: Explainer, plan: Plan, size: tuple[int, int], geometry: GeometryKind) -> None:
        self._explainer = explainer
        self._compute: Callable[[Sequence[Any]], AbstractContextManager[Iterator[Any]]]
        if geometry == "whole":
            self._compute = LocalPasses(explainer, plan, size).infer
        else:
            references = plan.references() if geometry == "reference" else plan.indices[:0]
            self._compute = LocalBatches(explainer, plan, references, size).compute

    @property
    def facts(self) -> Facts:
        return {"runtime": f"{self._explainer.choice.runtime} on {self._explainer.choice.device.type}"}

    def results(self, tasks: Sequence[Any]) -> Iterator[Any]:
        with self._compute(tasks) as results:
            yield from results

    def close(self) -> None:
        self._explainer.close()


class DistributedRun:
    """Computes the tasks of a run in the workers of an executor, and records the workers in the manifest of the store."""

    def __init__(self, executor: Executor, arguments: RunArguments, store: Store) -> None:
        self._executor = executor
        self._arguments = arguments
        self._workers = WorkerRecord(store)

    def batches(self, pending: Sequence[int]) -> AbstractContextManager[Iterator[BatchResult]]:
        """The results of these batches, in the order in which they arrive."""
        return self._executor.results(self._arguments, pending, "batch {}".format, self._workers.add)

    def passes(self, pending: Sequence[Part]) -> AbstractContextManager[Iterator[PartResult]]:
        """The results of these parts of the images, in the order in which they arrive."""
        return self._executor.results(self._arguments, pending, lambda part: f"images {part[0]} to {part[1] - 1}", self._workers.add)


class WorkerRecord:
    """The workers of a run in the entry ``workers`` of its manifest's environment. They must agree in everything that results depend on."""

    def __init__(self, store: Store) -> None:
        self._environment = store.manifest["environment"]
        self._first: Mapping[str, Any] | None = None

    def add(self, facts: Facts) -> None:
        """Raises KdxError for a worker whose results would differ in their digits from those of earlier workers."""
        if self._first is None:
            self._first = facts
            self._environment["runtime"] = facts["same"]["runtime"]
            self._environment["workers"] = {"threads": facts["same"]["threads"], "hosts": {}}
        different = [name for name, value in facts["same"].items() if self._first["same"].get(name) != value]
        if different:
            name = different[0]
            one, other = (f"{worker['same'].get(name)} on {worker['host']}" for worker in (self._first, facts))
            raise KdxError(
                f"The workers differ in {name}: {one}, and {other}.",
                "Install the same versions on all machines, and name --runtime and --device.",
            )
        hosts = self._environment["workers"]["hosts"]
        hosts[facts["host"]] = hosts.get(facts["host"], 0) + 1
