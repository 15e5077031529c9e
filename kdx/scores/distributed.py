"""The scores of layers in workers of a cluster: each worker measures whole layers, so each layer's sums are those of one process."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdx.cluster.executor import Executor
from kdx.cluster.service import Facts
from kdx.features.rows import Source
from kdx.kernels import ambient
from kdx.scores.pool import LayerScores

Measure = Callable[[str, Mapping[str, Source]], LayerScores]
"""``measure(layer, by_role)``: the scores of a layer. It is pickled."""


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


class _LayerService:
    def __init__(self, arguments: _Arguments) -> None:
        self._arguments = arguments
        self.facts: Facts = {}

    def results(self, tasks: Sequence[str]) -> Iterator[tuple[str, LayerScores]]:
        for layer in tasks:
            sources = self._arguments.features[layer]
            by_role = {role: source.open() if isinstance(source, _MappedFile) else source for role, source in sources.items()}
            with ambient.neutral():
                scores = self._arguments.measure(layer, by_role)
            yield layer, scores

    def close(self) -> None: ...


def layers_in(executor: Executor, features: Mapping[str, Mapping[str, Source]], measure: Measure) -> dict[str, LayerScores]:
    """``measure`` of every layer in the workers of an executor, in the order of ``features``."""
    sent = {layer: {role: _sent(source) for role, source in by_role.items()} for layer, by_role in features.items()}
    with executor.results(_Arguments(sent, measure), list(features), "layer {}".format, lambda facts: None) as results:
        scores = dict(results)
    return {layer: scores[layer] for layer in features}
