"""The geometry ``whole``: every image goes through the networks once, then each layer is measured over all images at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx import threads
from kdx.data.images import Images, check_unreadable, decoded
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.explain.whole_set import measure_set
from kdx.features.array_files import new_array
from kdx.features.projection import projected, projected_channels
from kdx.features.target import Target
from kdx.kernels import tiles
from kdx.kernels.set_geometry import StoredDistances
from kdx.progress import progress
from kdx.roles import possessive, roles_among
from kdx.runs import schema
from kdx.runs.collected import Collected, check_classes, predictions
from kdx.runs.divisions import Divisions
from kdx.runs.feature_files import FeatureFiles, Shapes
from kdx.runs.influences import RunInfluences, parts_of
from kdx.runs.plan import Plan, aligned
from kdx.runs.progress_records import LayerProducts, LayerRecord
from kdx.runs.store import Store
from kdx.runs.writer import writing
from kdx.runtimes.transfers import Download, one_behind
from kdx.scores.paired import score_influences
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


Part = tuple[int, int]
"""The first image of a part, and the one after its last, in the order in which features are stored."""


@dataclass(frozen=True, eq=False)
class PartResult:
    """The outputs of the networks for a part of the images. They can be sent to another process.

    readable [k], features [k, C, h, w] by layer and role, columns of predictions [k], and the unreadable images with their reasons.
    """

    part: Part
    readable: NDArray[np.bool_]
    features: dict[str, dict[str, Tensor]]
    columns: dict[str, NDArray[Any]]
    unreadable: tuple[tuple[str, str], ...]


Infer = Callable[[Sequence[Part]], AbstractContextManager[Iterator[PartResult]]]
"""``infer(pending)``: the results of these parts inside a block, in any order."""


class LocalPasses:
    """Runs the networks on parts of the images in this process."""

    def __init__(self, explainer: Explainer, plan: Plan, size: tuple[int, int]) -> None:
        self._explainer = explainer
        self._plan = plan
        self._size = size
        self._order = _shuffled(plan)

    @contextmanager
    def infer(self, pending: Sequence[Part]) -> Iterator[Iterator[PartResult]]:
        """The results of these parts, in order. Raises KdxError for features that are not finite."""
        explainer, plan = self._explainer, self._plan
        parts, ahead = (self._order[slice(*part)] for part in pending), explainer.transfers.ahead
        with (
            decoded(plan.dataset, parts, self._size, plan.options.workers, explainer.choice.device) as images,
            threads.short_turns() if ahead else nullcontext(),
        ):
            passes = (_queue_part(explainer, plan, *job) for job in zip(pending, images, strict=True))
            yield (self._result(passed) for passed in one_behind(passes, ahead))

    def _result(self, passed: _Passed) -> PartResult:
        outputs, readable = passed.outputs.result(), passed.images.readable
        check_rows(outputs.finite, readable, [self._plan.dataset.ids[image] for image in self._order[slice(*passed.part)]])
        columns = {name: column.numpy() for name, column in outputs.columns.items()}
        return PartResult(passed.part, readable, outputs.features, columns, passed.images.unreadable)


def explain_whole(
    store: Store, plan: Plan, shapes: Shapes, infer: Infer, device: torch.device, announce: Callable[[str], None]
) -> FeatureFiles:
    """Compute and store every layer that is not stored yet. Returns the files of features. device: where layers are measured."""
    files = FeatureFiles(store.scratch / schema.FEATURES, len(plan.indices), shapes, plan.options.stored_precision, list(plan.layers))
    _infer(files, plan, infer, announce)
    check_unreadable(files.unreadable, len(plan.indices), plan.options.max_unreadable)
    index = _shuffled(plan)[files.kept]
    target, divisions = plan.target(index), Divisions.of(plan, index)
    for place, layer in enumerate(plan.layers):
        if not store.has_layer(place):
            _measure(store, files, plan, place, layer, Target.of(target.to(device)), divisions, device)
    return files


def _infer(files: FeatureFiles, plan: Plan, infer: Infer, announce: Callable[[str], None]) -> None:
    """Run the networks on every image that is not stored yet."""
    total, pending = len(plan.indices), [(part.start, part.stop) for part in files.pending(aligned(plan.options.batch))]
    done = total - sum(stop - start for start, stop in pending)
    if pending and done:
        announce(f"Resuming: the features of {done} of {total} images are stored.")
    unreadable = {*files.unreadable}
    with infer(pending) as results, writing() as submit, progress() as show:
        for result in results:
            show("Networks", done, total, "images")
            readable = np.array(result.readable)  # an array from another process may be read-only, which PyTorch refuses
            submit(partial(files.write, slice(*result.part), readable, result.features, result.columns, result.unreadable))
            unreadable.update(result.unreadable)
            check_unreadable(sorted(unreadable), total, plan.options.max_unreadable)
            done += result.part[1] - result.part[0]
        show("Networks", total, total, "images")


@dataclass(frozen=True, eq=False)
class _Outputs:
    """The outputs of the networks for a part of the images: the columns of predictions, the features, and which rows of these are
    finite."""

    columns: dict[str, Tensor]
    features: dict[str, dict[str, Tensor]]
    finite: dict[str, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class _Passed:
    """A part of the images whose passes, and whose copies to the host, are queued."""

    part: Part
    images: Images
    outputs: Download[_Outputs]


def _queue_part(explainer: Explainer, plan: Plan, part: Part, images: Images) -> _Passed:
    """Run the networks on a part of the images. On a GPU this queues the passes and the copy of the outputs to the host."""
    count = len(images.rows)
    # Unreadable images are blank, so that the other images keep their places in the pass. Blank images also fill the last pass.
    fill = aligned(count) - count
    levels = torch.cat([images.rows, images.rows.new_zeros(fill, *images.rows.shape[1:])]) if fill else images.rows
    logits, features = explainer.features(levels)
    check_classes(logits, len(plan.dataset.classes))
    features = {layer: {role: rows[:count] for role, rows in by_role.items()} for layer, by_role in features.items()}
    finite = finite_rows(features)
    if plan.options.project:
        features = {
            layer: {role: projected(values, plan.options.project, plan.options.seed, role, layer) for role, values in by_role.items()}
            for layer, by_role in features.items()
        }
    columns = predictions({role: rows[:count] for role, rows in logits.items()})
    return _Passed(part, images, explainer.transfers.download(_Outputs(columns, features, finite)))


def check_finite(features: Mapping[str, Mapping[str, Tensor]], readable: NDArray[np.bool_], names: Sequence[str]) -> None:
    """KdxError, with the name of an image, if features of readable images contain NaN or infinity."""
    check_rows(finite_rows(features), readable, names)


def finite_rows(features: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Per layer and role: which images [n] have no NaN and no infinity in their features."""
    return {layer: {role: values.isfinite().flatten(1).all(1) for role, values in of.items()} for layer, of in features.items()}


def check_rows(finite: Mapping[str, Mapping[str, Tensor]], readable: NDArray[np.bool_], names: Sequence[str]) -> None:
    """`check_finite` from the result of `finite_rows`."""
    for layer, by_role in finite.items():
        for role, rows in by_role.items():
            bad = readable & ~rows.numpy(force=True)
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
        features = files.rows(layer, device)
        distances = StoredDistances.bytes(len(files.kept), len(features))
        # The sweeps also need the rows of a tile, and the products of its positions.
        on_gpu = device.type == "cuda" and 2 * (distances + tiles.GPU_BYTES) <= torch.cuda.mem_get_info(device)[0]
        measurement = measure_set(
            features,
            target,
            plan.options,
            output,
            shuffled=True,
            classes=divisions.codes,
            groups=divisions.groups,
            folder=None if on_gpu else folder,
            progress=lambda done, total: show(f"Geometry of {layer}", done, total, "tiles"),
        )
        products = LayerProducts(measurement.products, measurement.permuted, measurement.moments)
        order = _sorted(plan, files)
        grouped = divisions.by_kind(measurement.classes, measurement.groups)
        statistics = {kind: values.at(torch.from_numpy(order)) for kind, values in measurement.statistics.items()}
        store.write_layer(place, layer, maps, order, LayerRecord(products, statistics, measurement.null, grouped, measurement.influences))


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
    influences = {
        layer: score_influences(record.products.products, record.influences, roles)
        for layer, record in records.items()
        if record.influences is not None
    }
    return Collected(
        columns,
        scores,
        {layer: record.statistics for layer, record in records.items()},
        {layer: record.null for layer, record in records.items()},
        files.unreadable,
        divisions.named({layer: record.grouped for layer, record in records.items()}),
        divisions.left_out,
        RunInfluences(parts_of(order), influences) if influences else None,
    )
