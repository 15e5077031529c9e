"""The geometries ``batch`` and ``reference``: every batch is explained and stored by itself, and inner products are summed at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.images import Images, check_unreadable, decoded, load_references
from kdx.explain.explainer import Explainer
from kdx.explain.map_statistics import MapStatistics, mean_strength, stability
from kdx.features.score_maps import combined
from kdx.progress import progress
from kdx.roles import TARGET, maps_among, roles_among, score_maps_among
from kdx.runs import schema
from kdx.runs.collected import Collected, check_classes, prediction_columns
from kdx.runs.divisions import left_out_of_batches
from kdx.runs.plan import Plan
from kdx.runs.progress_records import BatchRecord, LayerProducts
from kdx.runs.store import Store
from kdx.scores.pool import Pool


def explain_batches(
    store: Store, explainer: Explainer, plan: Plan, references: NDArray[np.int64], size: tuple[int, int], announce: Callable[[str], None]
) -> None:
    """Explain and store every batch that is not stored yet. references: rows of the data set; none for the geometry ``batch``."""
    total = len(plan.batches)
    pending = [batch for batch in range(total) if not store.has(batch)]
    if pending and len(pending) < total:
        announce(f"Resuming: {total - len(pending)} of {total} batches are done.")
    if len(references) and pending:
        _use_references(explainer, plan, references, size)
    unreadable: list[tuple[str, str]] = []
    planned = (plan.indices[plan.batches[batch]] for batch in pending)
    with decoded(plan.dataset, planned, size, plan.options.workers) as results, progress() as show:
        for done, (batch, images) in enumerate(zip(pending, results, strict=True), total - len(pending)):
            show("Explaining", done, total, "batches")
            _explain_batch(store, explainer, plan, batch, images)
            unreadable += images.unreadable
            check_unreadable(unreadable, len(plan.indices), plan.options.max_unreadable)  # now, not after the last batch
        show("Explaining", total, total, "batches")


def _use_references(explainer: Explainer, plan: Plan, references: NDArray[np.int64], size: tuple[int, int]) -> None:
    explainer.use_references(load_references(plan.dataset, references, size), plan.target(references))


def _explain_batch(store: Store, explainer: Explainer, plan: Plan, batch: int, images: Images) -> None:
    """Explain and store one batch."""
    labels = plan.dataset.labels[images.kept]
    logits, measurements = explainer.explain(
        images.pixels, plan.target(images.kept), (plan.options.seed, batch), classes=torch.from_numpy(labels)
    )
    check_classes(logits, len(plan.dataset.classes))
    columns = {schema.INDEX: images.kept, **prediction_columns(logits)}
    products = {
        layer: LayerProducts(measurement.products, measurement.permuted, measurement.moments) for layer, measurement in measurements.items()
    }
    shares = {layer: {name: value.float() for name, value in measurement.shares.items()} for layer, measurement in measurements.items()}
    maps = {
        layer: {name: value.maps.float().numpy(force=True) for name, value in measurement.maps.items()}
        for layer, measurement in measurements.items()
    }
    store.write_batch(batch, plan.widest, plan.widest * len(plan.batches), maps, BatchRecord(columns, products, images.unreadable, shares))


def collect_batches(store: Store, plan: Plan) -> Collected:
    """The results of all batches. The maps that add up to the scores are computed here, since they depend on the inner products of all."""
    roles = roles_among(store.manifest["configuration"]["models"])
    pools = {layer: Pool(roles, mean=plan.options.ratios == "mean") for layer in plan.layers}
    records = [store.read_batch(batch) for batch in range(len(plan.batches))]
    parts: list[dict[str, NDArray[Any]]] = []
    for batch, record in enumerate(records):
        for layer, pool in pools.items():
            pool.add(*record.layers[layer])
        count = len(record.columns[schema.INDEX])
        position = {schema.ROW: batch * plan.widest + np.arange(count), schema.BATCH: np.full(count, batch)}
        parts.append(position | record.columns)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    count = len(columns[schema.INDEX])
    return Collected(
        columns,
        {layer: pool.scores(n=count, confidence=plan.options.confidence) for layer, pool in pools.items()},
        {layer: _statistics(store, plan, layer, records, pools[layer].products, roles) for layer in plan.layers},
        {layer: {} for layer in plan.layers},
        [image for record in records for image in record.unreadable],
        left_out=left_out_of_batches(plan, store.manifest["geometry"]),
    )


def _statistics(
    store: Store, plan: Plan, layer: str, records: Sequence[BatchRecord], products: Tensor, roles: Sequence[str]
) -> dict[str, MapStatistics]:
    """The statistics of every kind of map at a layer. Writes the maps that add up to a score."""
    names = (*roles, TARGET)
    stored = all(layer in record.shares for record in records)  # the records of kdx 0.1.0 have no shares
    kinds = score_maps_among(roles) if stored else {}
    parts: dict[str, list[MapStatistics]] = {}
    rows, total = plan.widest, plan.widest * len(plan.batches)
    for batch, record in enumerate(records):
        contexts = {name: combined(kind, record.shares[layer], products, names) for name, kind in kinds.items()}
        store.write_maps(batch, rows, total, {layer: {name: value.sum(0).float().numpy() for name, value in contexts.items()}})
        count = len(record.columns[schema.INDEX])
        for name, value in contexts.items():
            maps = value.sum(0)
            # An explainer file gives one context, from which no stability follows.
            known = stability(value[0], value[1]) if len(value) == 2 else torch.full((count,), torch.nan, dtype=torch.float64)
            parts.setdefault(name, []).append(MapStatistics(maps.double().sum((1, 2)), mean_strength(maps), known))
        for name in maps_among(roles):
            maps = torch.from_numpy(store.read_maps(layer, name, batch * rows, count))
            unknown = torch.full((count,), torch.nan, dtype=torch.float64)
            parts.setdefault(name, []).append(MapStatistics(maps.double().sum((1, 2)), mean_strength(maps), unknown))
    return {name: MapStatistics.joined(values) for name, values in parts.items()}
