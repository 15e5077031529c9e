"""The geometry ``whole``: every image goes through the networks once, then each layer is measured over all images at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.images import Images, check_unreadable, decoded
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.explain.whole_set import measure_set
from kdx.features.array_files import new_array
from kdx.features.projection import projected, projected_channels
from kdx.features.target import Target
from kdx.progress import progress
from kdx.roles import possessive, roles_among
from kdx.runs import schema
from kdx.runs.collected import Collected, check_classes, prediction_columns
from kdx.runs.divisions import Divisions
from kdx.runs.feature_files import FeatureFiles, Shapes
from kdx.runs.plan import Plan, aligned
from kdx.runs.progress_records import LayerProducts, LayerRecord
from kdx.runs.store import Store
from kdx.scores.pool import Pool


def feature_shapes(explainer: Explainer, size: tuple[int, int], project: int) -> Shapes:
    """The shape of each role's features at each layer, from a pass over blank images."""
    _, features = explainer.features(torch.zeros(2, 3, *size))
    shapes: dict[str, dict[str, tuple[int, int, int]]] = {role: {} for role in explainer.roles}
    for layer, by_role in features.items():
        for role, values in by_role.items():
            channels, height, width = values.shape[1:]
            shapes[role][layer] = projected_channels(channels, project), height, width
    return shapes


def explain_whole(
    store: Store, explainer: Explainer, plan: Plan, shapes: Shapes, size: tuple[int, int], announce: Callable[[str], None]
) -> FeatureFiles:
    """Compute and store every layer that is not stored yet. Returns the files of features."""
    files = FeatureFiles(store.folder / schema.FEATURES, len(plan.indices), shapes, plan.options.stored_precision, list(plan.layers))
    _infer(files, explainer, plan, size, announce)
    check_unreadable(files.unreadable, len(plan.indices), plan.options.max_unreadable)
    device = torch.device(explainer.choice.device)
    index = _shuffled(plan)[files.kept]
    target, divisions = plan.target(index), Divisions.of(plan, index)
    for place, layer in enumerate(plan.layers):
        if not store.has_layer(place):
            _measure(store, files, plan, place, layer, Target.of(target.to(device)), divisions, device)
    return files


def _infer(files: FeatureFiles, explainer: Explainer, plan: Plan, size: tuple[int, int], announce: Callable[[str], None]) -> None:
    """Run the networks on every image that is not stored yet."""
    unit = aligned(plan.options.batch)
    total, pending = len(plan.indices), files.pending(unit)
    remaining = sum(part.stop - part.start for part in pending)
    if pending and remaining < total:
        announce(f"Resuming: the features of {total - remaining} of {total} images are stored.")
    done = total - remaining
    order = _shuffled(plan)
    with decoded(plan.dataset, (order[part] for part in pending), size, plan.options.workers) as results, progress() as show:
        for part, images in zip(pending, results, strict=True):
            show("Networks", done, total, "images")
            _infer_part(files, explainer, plan, part, order[part], images)
            check_unreadable(files.unreadable, total, plan.options.max_unreadable)
            done += part.stop - part.start
        show("Networks", total, total, "images")


def _infer_part(files: FeatureFiles, explainer: Explainer, plan: Plan, part: slice, planned: NDArray[np.int64], images: Images) -> None:
    readable = np.isin(planned, images.kept)
    # A blank image replaces every unreadable one, so that the other images keep their places in the pass, and blank images fill the pass.
    pixels = torch.zeros(aligned(len(planned)), *images.pixels.shape[1:])
    pixels[: len(planned)][torch.from_numpy(readable)] = images.pixels
    logits, features = explainer.features(pixels)
    logits = {role: rows[: len(planned)] for role, rows in logits.items()}
    features = {layer: {role: rows[: len(planned)] for role, rows in by_role.items()} for layer, by_role in features.items()}
    check_classes(logits, len(plan.dataset.classes))
    check_finite(features, readable, [plan.dataset.ids[image] for image in planned])
    if plan.options.project:
        features = {
            layer: {role: projected(values, plan.options.project, plan.options.seed, role, layer) for role, values in by_role.items()}
            for layer, by_role in features.items()
        }
    files.write(part, readable, features, prediction_columns(logits), images.unreadable)


def check_finite(features: Mapping[str, Mapping[str, Tensor]], readable: NDArray[np.bool_], names: Sequence[str]) -> None:
    """KdxError, with the name of an image, if features of readable images contain NaN or infinity."""
    for layer, by_role in features.items():
        for role, values in by_role.items():
            bad = readable & ~values.isfinite().flatten(1).all(1).numpy(force=True)
            if bad.any():
                owner, example = possessive(role), names[bad.argmax()]
                raise KdxError(
                    f"{owner} features at {layer} are not finite for {bad.sum()} of {len(bad)} images, such as {example}.",
                    "Check the weights, the preprocessing and --precision: NaN and infinity have no distances.",
                )


def _measure(
    store: Store,
    files: FeatureFiles,
    plan: Plan,
    place: int,
    layer: str,
    target: Target,
    divisions: Divisions,
    device: torch.device,
) -> None:
    """Measure and store one layer, with maps and statistics in the order of the data set."""
    maps: dict[str, NDArray[np.float32]] = {}

    def output(kind: str, shape: tuple[int, int, int]) -> Tensor:
        maps[kind] = new_array(folder / f"maps-{kind}.npy", shape, "float32")
        return torch.from_numpy(maps[kind])

    with files.scratch() as folder, progress() as show, torch.no_grad():
        measurement = measure_set(
            files.rows(layer, device),
            target,
            plan.options,
            output,
            shuffled=True,
            classes=divisions.codes,
            groups=divisions.groups,
            folder=folder,
            progress=lambda done, total: show(f"Geometry of {layer}", done, total, "tiles"),
        )
        products = LayerProducts(measurement.products, measurement.permuted, measurement.moments)
        order = _sorted(plan, files)
        grouped = divisions.by_kind(measurement.classes, measurement.groups)
        statistics = {kind: values.at(torch.from_numpy(order)) for kind, values in measurement.statistics.items()}
        store.write_layer(place, layer, maps, order, LayerRecord(products, statistics, measurement.null, grouped))


def _shuffled(plan: Plan) -> NDArray[np.int64]:
    """The images to explain, as rows of the data set, in the random order in which their features are stored."""
    return np.random.default_rng(plan.options.seed).permutation(plan.indices)


def _sorted(plan: Plan, files: FeatureFiles) -> NDArray[np.int64]:
    """The places of the readable images among themselves, in the order of the data set."""
    return np.argsort(_shuffled(plan)[files.kept])


def collect_whole(store: Store, plan: Plan, files: FeatureFiles) -> Collected:
    """The results of all layers."""
    roles = roles_among(store.manifest["configuration"]["models"])
    order = _sorted(plan, files)
    index = _shuffled(plan)[files.kept][order]
    predictions = {name: values[order] for name, values in files.columns().items()}
    columns: dict[str, NDArray[Any]] = {schema.ROW: np.arange(len(index)), schema.INDEX: index, **predictions}
    records = {layer: store.read_layer(place) for place, layer in enumerate(plan.layers)}
    divisions = Divisions.of(plan, index)
    scores = {}
    for layer, record in records.items():
        pool = Pool(roles)
        pool.add(*record.products)
        scores[layer] = pool.scores(n=len(index), confidence=plan.options.confidence)
    return Collected(
        columns,
        scores,
        {layer: record.statistics for layer, record in records.items()},
        {layer: record.null for layer, record in records.items()},
        files.unreadable,
        divisions.named({layer: record.grouped for layer, record in records.items()}),
        divisions.left_out,
    )
