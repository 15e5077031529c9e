"""A run over a data set: plans it, runs the networks, measures and stores. A stopped run resumes where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdx.choices import COVER
from kdx.cluster.executor import Executor
from kdx.data.images import check_unreadable, load_images
from kdx.disk import scratch_folder
from kdx.errors import KdxError, resumable
from kdx.explain.explainer import Explainer
from kdx.explain.graph import largest_size
from kdx.explain.network_set import NetworkRecord
from kdx.explain.shared_features import SharedFeatures
from kdx.remote import is_url, without_credentials
from kdx.roles import BASELINE, mapped_among
from kdx.runs import schema
from kdx.runs.batches import Compute, LocalBatches, collect_batches, explain_batches
from kdx.runs.class_order import class_order_warning
from kdx.runs.collected import Collected
from kdx.runs.distributed import DistributedRun, GeometryKind, RunArguments
from kdx.runs.environment import environment, now
from kdx.runs.gallery_choice import check_order, write_choice
from kdx.runs.geometry import Geometry, choose_geometry, requested_geometry
from kdx.runs.grouping import MAX_GROUPS
from kdx.runs.image_numbers import prediction_numbers
from kdx.runs.measured import Samples
from kdx.runs.plan import Plan, aligned
from kdx.runs.plan import RunOptions as RunOptions
from kdx.runs.schema import (
    Configuration,
    Context,
    InputFiles,
    NetworkDetails,
    SplitRule,
    StoredFeatures,
    StoredInputs,
    StoredNetwork,
    StoredOptions,
)
from kdx.runs.store import Store
from kdx.runs.target_names import target_phrase
from kdx.runs.training_scores import logged_scores, write_training_scores
from kdx.runs.whole import Infer, LocalPasses, collect_whole, explain_whole, feature_shapes
from kdx.runtimes.choice import allows_tf32
from kdx.scores.uncertainty import accuracy


def explain_dataset(
    data: str,
    models: Path,
    out: Path,
    layers: Sequence[str] = (),
    options: RunOptions = RunOptions(),
    *,
    networks: Path | None = None,
    command: Sequence[str] = (),
    restart: bool = False,
    shared_features: Path | None = None,
    executor: Executor | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Explain ``data`` with the networks of a models file, or with an explainer file, and store the run in the folder ``out``.

    data, out: a path or a URL. If ``out`` is a URL, the large files that only an unfinished run needs are in the folder of kdx's
    caches.

    layers: names that the networks share, or ``student_layer=teacher_layer``; by default those of the models file.
    networks: the folder for exported networks, by default out/networks. command: the command line, for the manifest. restart: compute a
    complete run again. A stopped run resumes, with the same result.
    shared_features: a folder for the outputs of the teacher, the base and the random baseline. Runs with the same folder compute them once
    if data, size, layers, runtime and batches are the same, and otherwise each run computes its own; the results do not change. Several
    processes may use the folder at once. The caller deletes it. The runtime ``auto`` is that of the first run.
    executor: computes the batches in other processes; None computes them in this one. This process writes the results in any case.

    Raises KdxError for anything that the user can fix, if possible before anything is written.
    """
    if options.keep_features and is_url(out):
        raise KdxError("Features can only be kept in a local folder.", "Leave --keep-features out, or give a local --out.")
    plan = Plan.of(without_credentials(data), models, layers, options)
    for line in (*plan.split.lines(), plan.dataset.note):
        if line:
            announce(line)
    if plan.own_target is not None:
        announce(f"Target: {target_phrase(plan.own_target.name)}.")
    geometry = requested_geometry(plan)
    shared = None if shared_features is None else SharedFeatures(shared_features)
    with ExitStack() as stack, plan.explainer(networks or scratch_folder(out) / schema.NETWORKS, announce, shared) as explainer:
        records = explainer.networks()
        size = largest_size(record.image_size for record in records.values())
        store = stack.enter_context(
            Store.begin(out, _configuration(plan, records, size), _context(plan, command, out), lambda: plan.dataset.fingerprint_of_0_1_0)
        )
        if store.replaces:
            announce(store.replaces)
        if store.complete and not restart:
            store.tidy(keep_features=options.keep_features)
            announce(f"{out} is already complete; its page is written again.")
            return
        if store.complete:
            store.restart()
        try:
            with resumable(lambda: store.has_progress):
                _prepare_and_explain(store, explainer, plan, layers, executor, size, geometry, announce, shared)
        except KdxError as error:
            store.fail(error.problem)
            raise


def _prepare_and_explain(
    store: Store,
    explainer: Explainer,
    plan: Plan,
    layers: Sequence[str],
    executor: Executor | None,
    size: tuple[int, int],
    geometry: Geometry | None,
    announce: Callable[[str], None],
    shared: SharedFeatures | None,
) -> None:
    """Open the networks, record what they are, and compute what is missing."""
    records = explainer.networks()
    started = store.manifest["environment"].get("runtime") if store.has_progress else None
    runtime = None if started is None else str(started).split()[0]
    if runtime is None and shared is not None:
        runtime = shared.runtime()
    explainer.open(size, len(plan.indices), runtime=runtime, batch=aligned(plan.options.batch))
    if shared is not None:
        shared.keep_runtime(explainer.choice.runtime)
    announce(f"Runtime {explainer.choice.why}.")
    store.manifest["environment"]["runtime"] = f"{explainer.choice.runtime} on {explainer.choice.device}"
    networks = (plan.models.path, plan.models.student, plan.models.base, plan.models.teacher)
    store.manifest["environment"]["tf32"] = allows_tf32(explainer.choice, networks)
    store.manifest["random_weights"] = [role for role, record in records.items() if not record.trained and role != BASELINE]
    for role in store.manifest["random_weights"]:
        announce(f"Some or all weights of the {role} are random: {records[role].reference}.")
    work = _Work(store, explainer, plan, tuple(layers), executor, size)
    _explain(work, geometry, announce, 0 if shared is None else shared.bytes)


@dataclass(frozen=True, eq=False)
class _Work:
    """A run whose networks are open. layers: as the user gave them. executor: None computes in this process."""

    store: Store
    explainer: Explainer
    plan: Plan
    layers: tuple[str, ...]
    executor: Executor | None
    size: tuple[int, int]

    def batches(self, references: NDArray[np.int64]) -> Compute:
        """The function that computes the batches of the geometry ``reference``, or ``batch`` without references."""
        if self.executor is None:
            return LocalBatches(self.explainer, self.plan, references, self.size).compute
        return DistributedRun(self.executor, self._arguments("reference" if len(references) else "batch"), self.store).batches

    def passes(self) -> Infer:
        """The function that runs the networks for the geometry ``whole``."""
        if self.executor is None:
            return LocalPasses(self.explainer, self.plan, self.size).infer
        return DistributedRun(self.executor, self._arguments("whole"), self.store).passes

    def _arguments(self, geometry: GeometryKind) -> RunArguments:
        hashes = {role: record.sha256 for role, record in self.explainer.networks().items()}
        runtime = self.explainer.choice.runtime
        self.explainer.close()  # the workers open their own networks, which may need the same GPU's memory
        return RunArguments.of(self.plan, self.layers, self.size, runtime, hashes, geometry)


def _explain(work: _Work, geometry: Geometry | None, announce: Callable[[str], None], shared_bytes: int) -> None:
    """Compute what is missing of a run, and complete it. geometry: None where it depends on the size of the features."""
    store, explainer, plan, size = work.store, work.explainer, work.plan, work.size
    shapes = feature_shapes(explainer, size, plan.options.project) if geometry is None else {}
    if "geometry" in store.manifest:  # a resumed run keeps its geometry, whatever the machine can do now
        geometry = Geometry(store.manifest["geometry"], store.manifest["geometry_reason"])
    elif geometry is None and store.has(0):  # kdx 0.1.0 did not record it
        geometry = Geometry("batch", "the run was started by an older version")
    elif geometry is None:
        geometry = choose_geometry(plan, shapes, store.scratch, shared_bytes)
    store.set_geometry(geometry.kind, geometry.reason, batches=1 if geometry.kind == "whole" else len(plan.batches))
    announce(f"Geometry {geometry.kind}: {geometry.reason}.")
    if geometry.kind == "whole":
        if plan.options.project:
            announce(_projection_note(plan.options.project))
        files = explain_whole(store, plan, shapes, work.passes(), torch.device(explainer.choice.device), announce)
        explainer.close()
        _finish(store, plan, collect_whole(store, plan, files), size, announce)
        return
    if plan.options.keep_features or plan.options.project or plan.options.stored_precision != "float32":
        announce(f"The geometry {geometry.kind} stores no features: --store, --project and --keep-features have no effect.")
    references = plan.references() if geometry.kind == "reference" else plan.indices[:0]
    if len(references):
        store.manifest["reference_ids"] = [plan.dataset.ids[index] for index in references]
    explain_batches(store, plan, work.batches(references), announce)
    explainer.close()
    _finish(store, plan, collect_batches(store, plan), size, announce)


def _projection_note(project: int) -> str:
    return (
        f"Features of more channels are projected to {project} random channels per position. Squared distances keep their expected value, "
        f"with a relative standard deviation of at most {(2 / project) ** 0.5:.1%}; maps and scores are those of the projected features."
    )


def _configuration(plan: Plan, records: Mapping[str, NetworkRecord], size: tuple[int, int]) -> Configuration:
    """Everything that a run's results depend on."""
    rule: SplitRule = {"validation_is_test": True} if plan.split.validation_is_test else {}
    return {
        "data": plan.data,
        "split": plan.split.name,
        "fingerprint": plan.dataset.fingerprint,
        "split_seed": plan.models.split_seed,
        **rule,
        "models": {role: _identity(record) for role, record in records.items()},
        "layers": {layer: names.teacher for layer, names in plan.layers.items()},
        **_network_details(plan, records),
        "image_size": size,
        **_recorded_options(plan.options),
        **_recorded_inputs(plan),
    }


def _network_details(plan: Plan, records: Mapping[str, NetworkRecord]) -> NetworkDetails:
    details: NetworkDetails = {}
    if base_layers := {layer: names.base for layer, names in plan.layers.items() if names.base != layer}:
        details["base_layers"] = base_layers
    if code := {role: record.code for role, record in records.items() if record.code is not None}:
        details["source_code"] = code
    return details


def _identity(record: NetworkRecord) -> StoredNetwork:
    """What identifies a network in a run's configuration."""
    return {
        "reference": record.reference,
        "sha256": record.sha256,
        "parameters": record.parameters,
        "preprocessing": asdict(record.preprocessing),
    }


def _recorded_options(options: RunOptions) -> StoredOptions:
    """The options in a run's configuration. Defaults added later are omitted so that older runs still match."""
    recorded: StoredOptions = {
        "batch": options.batch,
        "runtime": options.runtime,
        "device": options.device,
        "objective": options.objective,
        "weighting": options.weighting,
        "reference_images": options.reference_images,
        "seed": options.seed,
        "permutations": options.permutations,
        "confidence": options.confidence,
    }
    if options.precision != "float32":
        recorded["precision"] = options.precision
    if options.features == "salient":
        recorded["features"] = {"kind": options.features, "keep": options.keep, "noise": options.noise}
        if options.salient_class != "predicted":
            recorded["features"]["class"] = options.salient_class
        if options.salient_score != "logit":
            recorded["features"]["score"] = options.salient_score
        if options.salient_image != "exact":
            recorded["features"]["image"] = options.salient_image
    if options.pooled:
        recorded["pooled"] = True
    if options.geometry != "auto":
        recorded["geometry"] = options.geometry
    if options.stored_precision != "float32":
        recorded["stored_precision"] = options.stored_precision
    if options.project:
        recorded["project"] = options.project
    if options.max_classes != MAX_GROUPS:
        recorded["max_classes"] = options.max_classes
    if options.ratios != "summed":
        recorded["ratios"] = options.ratios
    if options.decoder != "pillow":
        recorded["decoder"] = options.decoder
    return recorded


def _recorded_inputs(plan: Plan) -> StoredInputs:
    """The target and the resizing in a run's configuration; defaults are omitted."""
    recorded: StoredInputs = {}
    if plan.own_target is not None:
        recorded["target"] = plan.own_target.identity
    if plan.grouping is not None:
        recorded["groups"] = plan.grouping.identity
    if plan.dataset.resizing != COVER:
        recorded["resize"] = {"mode": plan.dataset.resizing.mode, "interpolation": plan.dataset.resizing.interpolation}
    return recorded


def _context(plan: Plan, command: Sequence[str], out: Path) -> Context:
    """The part of a manifest that does not affect the results."""
    files: InputFiles = {} if plan.own_target is None else {"target_file": plan.own_target.name}
    if plan.models.path.suffix == ".toml":
        files["models_file"] = _relative(plan.models.path, out)
    return {
        **files,
        "kdx": version("kdx"),
        "created": now(),
        "command": list(map(without_credentials, command)),
        "environment": environment(),
        "classes": list(plan.dataset.classes),
        "method": plan.models.training.get("method"),
        "batches": 0,  # known when the geometry is
    }


def _relative(path: Path, folder: Path) -> str:
    """The path relative to a folder, so that both can be moved together. It is the absolute path if there is no relative one, as between
    drives of Windows and from a URL."""
    if is_url(folder):
        return str(path.resolve())
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return str(path.resolve())


def _finish(store: Store, plan: Plan, collected: Collected, size: tuple[int, int], announce: Callable[[str], None]) -> None:
    """Write the scores and samples, the pictures of the gallery, and the rest of the manifest."""
    dataset, options = plan.dataset, plan.options
    roles = mapped_among(store.manifest["configuration"]["models"])
    columns, planned = collected.columns, len(plan.indices)
    for name in (schema.prediction_column(BASELINE), schema.confidence_column(BASELINE)):  # what random weights predict means nothing
        columns.pop(name, None)
    check_unreadable(collected.unreadable, planned, options.max_unreadable)
    index = columns.pop(schema.INDEX)
    columns[schema.LABEL] = dataset.labels[index]
    predictions = {role: columns[schema.prediction_column(role)] for role in roles}
    warning = class_order_warning(columns[schema.LABEL], predictions, dataset.classes)
    if warning is not None:
        announce(warning)
    maps = collected.map_columns()
    store.write_samples({schema.ID: [dataset.ids[i] for i in index], **columns, **maps})
    raw: StoredFeatures = {"kind": "raw"}
    store.write_scores(
        {
            "features": store.manifest["configuration"].get("features", raw),
            "accuracy": {
                role: accuracy(columns[schema.prediction_column(role)] == columns[schema.LABEL], options.confidence) for role in roles
            },
            "layers": collected.stored_layers(),
            "left_out": collected.left_out,
        }
    )
    if collected.influences is not None:
        collected.influences.write(store.folder)
    samples = Samples.of(columns, [dataset.ids[i] for i in index], roles)
    numbers = {**columns, **prediction_numbers(samples), **maps}
    check_order(options.gallery_order, tuple(numbers))  # salient features, for example, have no maps that add up to a score
    gallery = options.gallery_choice.places(samples, lambda name: np.asarray(numbers[name], dtype=np.float64), options.seed)
    pictures = load_images(replace(dataset, decoder=None), index[gallery], size)
    for row, levels in zip(columns[schema.ROW][gallery], pictures.levels, strict=True):
        store.write_picture(int(row), levels.permute(1, 2, 0).numpy())
    write_choice(store.folder, options.gallery_choice, [int(row) for row in columns[schema.ROW][gallery]])
    training_scores = logged_scores(plan.models, announce)
    if training_scores is not None:
        write_training_scores(store.folder, training_scores)
    store.finish(
        now(),
        {
            "planned": planned,
            "explained": len(index),
            "unreadable": [{"id": name, "reason": reason} for name, reason in collected.unreadable],
            "trained_on": plan.split.trained_on(index),
        },
        keep_features=options.keep_features,
    )
