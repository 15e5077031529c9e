"""The scores of layers in workers of a cluster: they share the layers and, in each, the blocks of tiles (`kdx.kernels.tiles.Sweep`)."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from kdx.cluster.executor import Executor
from kdx.cluster.service import Facts
from kdx.features.rows import Source
from kdx.kernels import ambient
from kdx.kernels.tiles import Sweep
from kdx.scores.layer_scores import Measure
from kdx.scores.pool import LayerScores


@dataclass(frozen=True)
class _MappedFile:
    """A file that NumPy maps into memory, sent by its path instead of its content."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    order: Any

    def open(self) -> Source:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)


def _sent(source: Source) -> Source | _MappedFile:
    """The object that is sent to a worker: the path of a mapped file, otherwise the array.

    A part of a mapped file does not know its offset, and what is written to a copy ("c") is not in the file.
    """
    if not isinstance(source, np.memmap) or not isinstance(source.base, mmap.mmap) or source.filename is None or source.mode == "c":
        return source
    order = "C" if source.flags.c_contiguous else "F"
    return _MappedFile(str(source.filename), source.dtype, source.shape, source.offset, order)


@dataclass(frozen=True)
class _Arguments:
    """Builds the service of a worker."""

    features: Mapping[str, Mapping[str, Any]]
    measure: Measure

    def __call__(self) -> _LayerService:
        return _LayerService(self)


_Task = tuple[str, int | None]
"""A layer, and the number of one of its blocks of tiles; None for the whole layer."""


class _LayerService:
    def __init__(self, arguments: _Arguments) -> None:
        self._arguments = arguments
        self._sweep: tuple[str, Sweep] | None = None
        self.facts: Facts = {}

    def results(self, tasks: Sequence[_Task]) -> Iterator[tuple[_Task, Any]]:
        """Per task the scores of the layer, or the sums of the block."""
        for layer, block in tasks:
            with ambient.neutral():
                if block is None:
                    result: Any = self._arguments.measure.scores(layer, self._sources(layer))
                else:
                    if self._sweep is None or self._sweep[0] != layer:
                        self._sweep = layer, self._arguments.measure.sweep(layer, self._sources(layer))
                    result = self._sweep[1].sums(block)
            yield (layer, block), result

    def close(self) -> None: ...

    def _sources(self, layer: str) -> dict[str, Source]:
        sources = self._arguments.features[layer]
        return {role: source.open() if isinstance(source, _MappedFile) else source for role, source in sources.items()}


class _Total:
    """The sums of blocks, added in the order of the blocks, in whichever order they arrive."""

    def __init__(self) -> None:
        self.sums: Sequence[Tensor] = ()
        self._next = 0
        self._waiting: dict[int, Sequence[Tensor]] = {}

    def add(self, block: int, sums: Sequence[Tensor]) -> None:
        self._waiting[block] = sums
        while self._next in self._waiting:
            sums = self._waiting.pop(self._next)
            self.sums = [own + other for own, other in zip(self.sums, sums, strict=True)] if self.sums else sums
            self._next += 1


def layers_in(executor: Executor, features: Mapping[str, Mapping[str, Source]], measure: Measure) -> dict[str, LayerScores]:
    """The scores of every layer from the workers of an executor, in the order of ``features``."""
    sent = {layer: {role: _sent(source) for role, source in by_role.items()} for layer, by_role in features.items()}
    counts = {layer: measure.blocks(layer, by_role) for layer, by_role in features.items()}
    tasks: list[_Task] = [(layer, block) for layer, count in counts.items() for block in ([None] if count is None else range(count))]
    scores: dict[str, LayerScores] = {}
    totals = {layer: _Total() for layer, count in counts.items() if count is not None}
    threads = list[int]()
    with executor.results(_Arguments(sent, measure), tasks, _name, lambda facts: threads.append(facts["same"]["threads"])) as results:
        for (layer, block), result in results:
            if block is None:
                scores[layer] = result
            else:
                totals[layer].add(block, result)
    for layer, total in totals.items():
        with ambient.torch_threads(threads[0]):
            scores[layer] = measure.scores(layer, features[layer], [total.sums])
    return {layer: scores[layer] for layer in features}


def _name(task: _Task) -> str:
    layer, block = task
    return f"layer {layer}" if block is None else f"block {block} of layer {layer}"
