"""The geometries ``batch`` and ``reference``: every batch is explained and stored by itself, and inner products are summed at the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx import threads
from kdx.data.images import Images, check_unreadable, decoded, load_references
from kdx.data.prefetch import Job, prefetch
from kdx.errors import KdxError, printable
from kdx.explain.batch_target import BatchTarget
from kdx.explain.explainer import Explainer
from kdx.explain.layer import LayerMeasurement, PendingMeasurement
from kdx.explain.map_statistics import MapStatistics, mean_strength, stability
from kdx.features.score_maps import combined
from kdx.progress import progress
from kdx.roles import TARGET, maps_among, roles_among, score_maps_among
from kdx.runs import schema
from kdx.runs.collected import Collected, check_classes, predictions
from kdx.runs.divisions import left_out_of_batches
from kdx.runs.plan import Plan
from kdx.runs.progress_records import BatchRecord, LayerProducts
from kdx.runs.store import Store
from kdx.runs.writer import writing
from kdx.runtimes.transfers import Download, on_host, one_behind
from kdx.scores.pool import Pool


@dataclass(frozen=True, eq=False)
class _Ready:
    """A batch before its passes: its number, its images and their target."""

    number: int
    images: Images
    target: BatchTarget


@dataclass(frozen=True, eq=False)
class _Results:
    """The results of a batch at a layer that a run keeps: inner products, shares and maps."""

    products: LayerProducts
    shares: dict[tuple[str, str], Tensor]
    maps: dict[str, Tensor]

    @classmethod
    def of(cls, measured: LayerMeasurement) -> Self:
        return cls(
            LayerProducts(measured.products, measured.permuted, measured.moments),
            {name: value.float() for name, value in measured.shares.items()},
            {name: value.maps.float() for name, value in measured.maps.items()},
        )


@dataclass(frozen=True, eq=False)
class _Queued:
    """A batch whose work is queued. download: copies the columns of predictions, the expected results of each layer, and the numbers with
    which each pending measurement checks these results."""

    number: int
    images: Images
    pending: dict[str, PendingMeasurement]
    download: Download[tuple[dict[str, Tensor], dict[str, _Results], dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class BatchResult:
    """The results of a batch that a run stores: the maps [n, h, w] by layer and kind, and the record. It can be sent to another process."""

    number: int
    maps: dict[str, dict[str, NDArray[np.float32]]]
    record: BatchRecord


Compute = Callable[[Sequence[int]], AbstractContextManager[Iterator[BatchResult]]]
"""``compute(pending)``: the results of these batches inside a block, in any order."""


class LocalBatches:
    """Computes batches in this process. references: rows of the data set; none for the geometry ``batch``.

    Images are decoded, and targets computed, while earlier batches are explained. On a GPU a batch is queued before the results of the
    previous one are read.
    """

    def __init__(self, explainer: Explainer, plan: Plan, references: NDArray[np.int64], size: tuple[int, int]) -> None:
        self._explainer = explainer
        self._plan = plan
        self._references = references
        self._size = size

    @contextmanager
    def compute(self, pending: Sequence[int]) -> Iterator[Iterator[BatchResult]]:
        """The results of these batches, in order. The references are used for the first of them."""
        explainer, plan = self._explainer, self._plan
        if len(self._references) and pending:
            explainer.use_references(load_references(plan.dataset, self._references, self._size), plan.target(self._references))
            self._references = self._references[:0]
        planned = (plan.indices[plan.batches[batch]] for batch in pending)
        ahead = explainer.transfers.ahead
        with (
            decoded(plan.dataset, planned, self._size, plan.options.workers, explainer.choice.device) as images,
            prefetch((_target_job(explainer, plan, *batch) for batch in zip(pending, images, strict=True)), ahead, 1) as ready,
            threads.short_turns() if ahead else nullcontext(),
        ):
            queued = one_behind((_queue(explainer, plan, batch) for batch in ready), ahead)
            yield (_result(batch, plan) for batch in queued)


def explain_batches(store: Store, plan: Plan, compute: Compute, announce: Callable[[str], None]) -> None:
    """Compute and store every batch that is not stored yet. A thread stores them, in the order in which they are computed."""
    total = len(plan.batches)
    pending = [batch for batch in range(total) if not store.has(batch)]
    if pending and len(pending) < total:
        announce(f"Resuming: {total - len(pending)} of {total} batches are done.")
    unreadable: list[tuple[str, str]] = []
    with compute(pending) as results, writing() as submit, progress() as show:
        for done, result in enumerate(results, total - len(pending)):
            show("Explaining", done, total, "batches")
            submit(partial(store.write_batch, result.number, plan.widest, plan.widest * total, result.maps, result.record))
            unreadable += result.record.unreadable
            check_unreadable(unreadable, len(plan.indices), plan.options.max_unreadable)  # now, not after the last batch
        show("Explaining", total, total, "batches")


def _target_job(explainer: Explainer, plan: Plan, number: int, images: Images) -> Job[_Ready]:
    """The target of a batch, which does not depend on the pixels."""
    ready: list[_Ready] = []

    def compute() -> None:
        with _about(number, images, plan):
            labels, seed = torch.from_numpy(plan.dataset.labels[images.kept]), (plan.options.seed, number)
            target = BatchTarget.of(plan.target(images.kept), plan.options.permutations, seed, labels)
        ready.append(_Ready(number, images, target.moved(explainer.transfers.staged)))

    return Job([compute], ready.pop)


def _queue(explainer: Explainer, plan: Plan, batch: _Ready) -> _Queued:
    """Explain a batch. On a GPU this queues the work and the copy of its results to the host."""
    with _about(batch.number, batch.images, plan):
        logits, pending = explainer.begin(batch.images.levels, batch.target)
    check_classes(logits, len(plan.dataset.classes))
    results = {layer: _Results.of(measurement.expected) for layer, measurement in pending.items()}
    numbers = {layer: measurement.numbers for layer, measurement in pending.items()}
    download = explainer.transfers.download((predictions(logits), results, numbers))
    return _Queued(batch.number, batch.images, pending, download)


def _read(batch: _Queued, plan: Plan) -> tuple[dict[str, Tensor], dict[str, _Results]]:
    """The columns of predictions and the results of each layer, on the host. Raises KdxError for features that cannot be measured.

    Each layer's measurement is released here, because it keeps the features of the batch in memory while the loop keeps the batch.
    """
    columns, results, numbers = batch.download.result()
    for layer in list(batch.pending):
        pending = batch.pending.pop(layer)
        with _about(batch.number, batch.images, plan):
            measured = pending.result(numbers[layer])
        if measured.products is not pending.expected.products:  # the features were unusual and were measured again
            results[layer] = on_host(_Results.of(measured))
    return columns, results


def _result(batch: _Queued, plan: Plan) -> BatchResult:
    predicted, results = _read(batch, plan)
    columns = {schema.INDEX: batch.images.kept, **{name: column.numpy() for name, column in predicted.items()}}
    products = {layer: result.products for layer, result in results.items()}
    shares = {layer: result.shares for layer, result in results.items()}
    maps = {layer: {name: value.numpy() for name, value in result.maps.items()} for layer, result in results.items()}
    return BatchResult(batch.number, maps, BatchRecord(columns, products, batch.images.unreadable, shares))


@contextmanager
def _about(number: int, images: Images, plan: Plan) -> Iterator[None]:
    """Put the number of a batch and the name of its first image before the problem of a KdxError that the block raises."""
    try:
        yield
    except KdxError as error:
        first = plan.dataset.ids[images.kept[0]] if len(images.kept) else "unreadable"
        error.problem = printable(f"Batch {number} of {len(plan.batches)}, whose first image is {first}: {error.problem}")
        raise


def collect_batches(store: Store, plan: Plan) -> Collected:
    """The results of all batches. The maps that add up to the scores are computed here, since they depend on the inner products of all."""
    roles = roles_among(store.manifest["configuration"]["models"])
    pools = {layer: Pool(roles, mean=plan.options.ratios == "mean") for layer in plan.layers}
    parts: list[dict[str, NDArray[Any]]] = []
    unreadable: list[tuple[str, str]] = []
    with_shares = set(plan.layers)
    for batch, record in _records(store, plan):
        for layer, pool in pools.items():
            pool.add(*record.layers[layer])
        count = len(record.columns[schema.INDEX])
        position = {schema.ROW: batch * plan.widest + np.arange(count), schema.BATCH: np.full(count, batch)}
        parts.append(position | record.columns)
        unreadable += record.unreadable
        with_shares &= record.shares.keys()  # the records of kdx 0.1.0 have no shares
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    count = len(columns[schema.INDEX])
    return Collected(
        columns,
        {layer: pool.scores(n=count, confidence=plan.options.confidence) for layer, pool in pools.items()},
        _statistics(store, plan, {layer: pool.products for layer, pool in pools.items()}, roles, with_shares, count),
        {layer: {} for layer in plan.layers},
        unreadable,
        left_out=left_out_of_batches(plan, store.manifest["geometry"]),
    )


def _records(store: Store, plan: Plan) -> Iterator[tuple[int, BatchRecord]]:
    """The number and the record of each batch. One is in memory at a time: together, the shares of a million images take gigabytes."""
    for batch in range(len(plan.batches)):
        yield batch, store.read_batch(batch)


def _statistics(
    store: Store, plan: Plan, products: Mapping[str, Tensor], roles: Sequence[str], with_shares: Collection[str], images: int
) -> dict[str, dict[str, MapStatistics]]:
    """The statistics of every kind of map per layer. Writes the maps that add up to a score, at the layers ``with_shares``."""
    # One array per kind: the small tensors of many batches, kept between large ones that are freed, would make the heap grow.
    columns: dict[str, dict[str, Tensor]] = {layer: {} for layer in plan.layers}
    start = 0
    for batch, record in _records(store, plan):
        count = len(record.columns[schema.INDEX])
        for layer, by_name in columns.items():
            shares = record.shares[layer] if layer in with_shares else None
            for name, values in _batch_statistics(store, plan, layer, batch, count, shares, products[layer], roles).items():
                if name not in by_name:
                    by_name[name] = torch.empty(3, images, dtype=torch.float64)
                by_name[name][:, start : start + count] = torch.stack([values.total, values.strength, values.stability])
        start += count
    return {layer: {name: MapStatistics(*values) for name, values in by_name.items()} for layer, by_name in columns.items()}


def _batch_statistics(
    store: Store,
    plan: Plan,
    layer: str,
    batch: int,
    count: int,
    shares: Mapping[tuple[str, str], Tensor] | None,
    products: Tensor,
    roles: Sequence[str],
) -> dict[str, MapStatistics]:
    """The statistics of every kind of map of one batch of ``count`` images at a layer. Writes the maps that add up to a score."""
    rows, total, names = plan.widest, plan.widest * len(plan.batches), (*roles, TARGET)
    kinds = {} if shares is None else score_maps_among(roles)
    contexts = {name: combined(kind, shares, products, names) for name, kind in kinds.items() if shares is not None}
    store.write_maps(batch, rows, total, {layer: {name: value.sum(0).float().numpy() for name, value in contexts.items()}})
    result = {}
    unknown = torch.full((count,), torch.nan, dtype=torch.float64)
    for name, value in contexts.items():
        maps = value.sum(0)
        # An explainer file gives one context, from which no stability follows.
        known = stability(value[0], value[1]) if len(value) == 2 else unknown
        result[name] = MapStatistics(maps.double().sum((1, 2)), mean_strength(maps), known)
    for name in maps_among(roles):
        maps = torch.from_numpy(store.read_maps(layer, name, batch * rows, count))
        result[name] = MapStatistics(maps.double().sum((1, 2)), mean_strength(maps), unknown)
    return result
