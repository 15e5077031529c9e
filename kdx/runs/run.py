"""A run over a data set: plans batches, runs the networks, measures and stores. A stopped run resumes where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdx.data.batches import random_batches
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import Images, decoded, load_images, load_references
from kdx.data.splits import class_balanced_sample
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.explain.explainer_file import describe_explainer, no_reference_mode, paired_layers
from kdx.explain.graph import largest_size
from kdx.explain.network_set import NetworkRecord
from kdx.explain.settings import Settings
from kdx.features.arrays import MIN_IMAGES
from kdx.models.layer_pairs import parse_layers
from kdx.models.models_file import ModelsFile, read_models
from kdx.progress import progress
from kdx.roles import roles_among
from kdx.runs import schema
from kdx.runs.environment import environment, now
from kdx.runs.schema import BatchRecord, Configuration, Context, LayerProducts, SplitRule, StoredFeatures, StoredNetwork, StoredOptions
from kdx.runs.split import SplitChoice, choose_split
from kdx.runs.store import Store
from kdx.runtimes.choice import is_file
from kdx.scores.pool import Pool
from kdx.scores.uncertainty import accuracy


@dataclass(frozen=True, kw_only=True)
class RunOptions(Settings):
    """How a run explains: the settings of `kdx.Explainer` and those below.

    batch: images whose geometry makes one set of maps.
    reference_images: with m > 0, every image is mapped among the same m class-balanced images instead of its batch mates.
    split: ``test``, ``validation``, ``train`` or ``all``. None takes ``test`` of the data that the models were trained on, and all of any
    other data. max_unreadable: the share of corrupt images above which the run fails; one image always passes, unless the share is 0.
    gallery: images shown in the report. workers: threads that decode the next batches while one is explained; None takes one per core,
    0 decodes each batch when it is needed.
    """

    batch: int = 64
    reference_images: int = 0
    split: str | None = None
    max_unreadable: float = 0.01
    gallery: int = 60
    workers: int | None = None


@dataclass(frozen=True)
class _Plan:
    """What a run explains: which images in which batches, with which networks, at which layers.

    batches: positions in ``indices``. references: the reference images, as rows of the data set.
    """

    data: str
    models: ModelsFile
    dataset: Dataset
    split: SplitChoice
    batches: list[NDArray[np.int64]]
    references: NDArray[np.int64]
    layers: dict[str, str]
    options: RunOptions

    @property
    def indices(self) -> NDArray[np.int64]:
        """The images to explain, as rows of the data set."""
        return self.split.indices

    @property
    def widest(self) -> int:
        return max(map(len, self.batches))


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
    announce: Callable[[str], None] = print,
) -> None:
    """Explain ``data`` with the networks of a models file, or with an explainer file, and store the run in the folder ``out``.

    layers: names that the networks share, or ``student_layer=teacher_layer``; by default those of the models file.
    networks: the folder for exported networks, by default out/networks. command: the command line, for the manifest. restart: compute a
    complete run again. A stopped run resumes, with the same result.

    Raises KdxError for anything that the user can fix, if possible before anything is written.
    """
    plan = _plan(data, models, layers, options)
    for line in plan.split.lines():
        announce(line)
    with ExitStack() as stack:
        with _explainer(plan, networks or out / schema.NETWORKS) as explainer:
            records = explainer.networks()
            size = largest_size(record.image_size for record in records.values())
            store = stack.enter_context(
                Store.begin(out, _configuration(plan, records, size), _context(plan, command), lambda: plan.dataset.fingerprint_of_0_1_0)
            )
            if store.complete and not restart:
                announce(f"{out} is already complete; its page is written again.")
                return
            if store.complete:
                store.restart()
            explainer.open(size)
            announce(f"Runtime {explainer.choice.why}.")
            store.manifest["environment"]["runtime"] = f"{explainer.choice.runtime} on {explainer.choice.device}"
            store.manifest["random_weights"] = [role for role, record in records.items() if not record.trained]
            for role in store.manifest["random_weights"]:
                announce(f"Some or all weights of the {role} are random: {records[role].reference}.")
            if len(plan.references):
                store.manifest["reference_ids"] = [plan.dataset.ids[index] for index in plan.references]
            _infer(store, explainer, plan, size, announce)
        _finish(store, plan, size)


def _plan(data: str, models: Path, layers: Sequence[str], options: RunOptions) -> _Plan:
    if options.reference_images and options.reference_images < MIN_IMAGES:
        raise KdxError(f"A reference set of {options.reference_images} is too small.", f"Give --reference {MIN_IMAGES} or more, or 0.")
    models_file = _from_explainer_file(models) if is_file(models) else read_models(models)
    dataset = open_data(data, models_file.classes or None)
    split = choose_split(dataset, models_file, options.split, options.seed)
    pairs = parse_layers(layers or models_file.layers)
    batches = random_batches(dataset.labels[split.indices], options.batch, options.seed)
    references = split.pool[:0]
    if options.reference_images:
        references = split.pool[class_balanced_sample(dataset.labels[split.pool], options.reference_images, options.seed)]
    return _Plan(data, models_file, dataset, split, batches, references, pairs, options)


def _configuration(plan: _Plan, records: Mapping[str, NetworkRecord], size: tuple[int, int]) -> Configuration:
    """Everything that a run's results depend on."""
    rule: SplitRule = {"validation_is_test": True} if plan.split.validation_is_test else {}
    return {
        "data": plan.data,
        "split": plan.split.name,
        "fingerprint": plan.dataset.fingerprint,
        "split_seed": plan.models.split_seed,
        **rule,
        "models": {role: _identity(record) for role, record in records.items()},
        "layers": plan.layers,
        "image_size": size,
        **_recorded_options(plan.options),
    }


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
    return recorded


def _context(plan: _Plan, command: Sequence[str]) -> Context:
    """The part of a manifest that does not affect the results."""
    return {
        "kdx": version("kdx"),
        "created": now(),
        "command": list(command),
        "environment": environment(),
        "classes": list(plan.dataset.classes),
        "method": plan.models.training.get("method"),
        "batches": len(plan.batches),
    }


def _infer(store: Store, explainer: Explainer, plan: _Plan, size: tuple[int, int], announce: Callable[[str], None]) -> None:
    """Explain and store every batch that is not stored yet."""
    total = len(plan.batches)
    pending = [batch for batch in range(total) if not store.has(batch)]
    if pending and len(pending) < total:
        announce(f"Resuming: {total - len(pending)} of {total} batches are done.")
    if len(plan.references) and pending:
        _use_references(explainer, plan.dataset, plan.references, size)
    unreadable: list[tuple[str, str]] = []
    planned = (plan.indices[plan.batches[batch]] for batch in pending)
    with decoded(plan.dataset, planned, size, plan.options.workers) as results, progress() as show:
        for done, (batch, images) in enumerate(zip(pending, results, strict=True), total - len(pending)):
            show("Explaining", done, total, "batches")
            _explain_batch(store, explainer, plan, batch, images)
            unreadable += images.unreadable
            _check_unreadable(unreadable, len(plan.indices), plan.options.max_unreadable)  # now, not after the last batch
        show("Explaining", total, total, "batches")


def _from_explainer_file(path: Path) -> ModelsFile:
    """The contents of a models file for the networks in an explainer file."""
    file = describe_explainer(path)
    layers = tuple(f"{layer}={other}" for layer, other in paired_layers(file).items())
    base, student, teacher = (file.networks[role].reference if role in file.networks else None for role in ("base", "student", "teacher"))
    assert base is not None and student is not None
    return ModelsFile(path, base, student, teacher, layers, file.classes)


def _explainer(plan: _Plan, folder: Path) -> Explainer:
    models = plan.models
    if is_file(models.path):
        if plan.options.reference_images:
            raise no_reference_mode(describe_explainer(models.path))
        return Explainer.of({}, plan.layers, plan.options, folder=folder, file=models.path)
    networks = {
        role: models.path.parent / reference if is_file(reference) else models.load(role) for role, reference in models.references.items()
    }
    return Explainer.of(networks, plan.layers, plan.options, folder=folder)


def _use_references(explainer: Explainer, dataset: Dataset, references: NDArray[np.int64], size: tuple[int, int]) -> None:
    explainer.use_references(load_references(dataset, references, size), torch.from_numpy(dataset.labels[references]))


def _explain_batch(store: Store, explainer: Explainer, plan: _Plan, batch: int, images: Images) -> None:
    """Explain and store one batch."""
    labels = torch.from_numpy(plan.dataset.labels[images.kept])
    logits, measurements = explainer.explain(images.pixels, labels, (plan.options.seed, batch))
    _check_classes(logits, len(plan.dataset.classes))
    columns: dict[str, NDArray[Any]] = {schema.INDEX: images.kept}
    for role, rows in logits.items():
        confidence, prediction = rows.float().softmax(1).max(1)
        columns[schema.prediction_column(role)] = prediction.numpy(force=True)
        columns[schema.confidence_column(role)] = confidence.numpy(force=True)
    products = {
        layer: LayerProducts(measurement.products, measurement.permuted, measurement.left_out if len(plan.batches) == 1 else None)
        for layer, measurement in measurements.items()
    }
    maps = {
        layer: {name: value.maps.float().numpy(force=True) for name, value in measurement.maps.items()}
        for layer, measurement in measurements.items()
    }
    store.write_batch(batch, plan.widest, plan.widest * len(plan.batches), maps, BatchRecord(columns, products, images.unreadable))


def _check_unreadable(unreadable: Sequence[tuple[str, str]], total: int, limit: float) -> None:
    if len(unreadable) > (max(1, limit * total) if limit else 0):
        name, reason = unreadable[0]
        raise KdxError(
            f"{len(unreadable)} of {total} images cannot be read, the first being {name} ({reason}).",
            "Repair or remove them, or allow more with --max-unreadable.",
        )


def _check_classes(logits: Mapping[str, torch.Tensor], classes: int) -> None:
    for role, rows in logits.items():
        if rows.shape[1] != classes:
            raise KdxError(
                f"The {role} predicts {rows.shape[1]} classes, and the data has {classes}.",
                "Name the networks' classes in their order, in the models file: classes = [...].",
            )


def _finish(store: Store, plan: _Plan, size: tuple[int, int]) -> None:
    """Write the scores and samples from the batches' records, the pictures of the gallery, and the rest of the manifest."""
    dataset, options = plan.dataset, plan.options
    roles = roles_among(store.manifest["configuration"]["models"])
    columns, pools, unreadable = _collect(store, plan, roles)
    planned = sum(map(len, plan.batches))
    _check_unreadable(unreadable, planned, options.max_unreadable)
    index = columns.pop(schema.INDEX)
    columns[schema.LABEL] = dataset.labels[index]
    store.write_samples({schema.ID: [dataset.ids[i] for i in index], **columns})
    raw: StoredFeatures = {"kind": "raw"}
    store.write_scores(
        {
            "features": store.manifest["configuration"].get("features", raw),
            "accuracy": {
                role: accuracy(columns[schema.prediction_column(role)] == columns[schema.LABEL], options.confidence) for role in roles
            },
            "layers": {
                layer: schema.stored_layer(pool.scores(n=len(index), confidence=options.confidence)) for layer, pool in pools.items()
            },
        }
    )
    gallery = _gallery(columns, roles, options)
    pictures = load_images(dataset, index[gallery], size)
    for row, pixels in zip(columns[schema.ROW][gallery], pictures.pixels, strict=True):
        store.write_picture(int(row), pixels.mul(255).round().byte().permute(1, 2, 0).numpy())
    store.finish(
        now(),
        {
            "planned": planned,
            "explained": len(index),
            "unreadable": [{"id": name, "reason": reason} for name, reason in unreadable],
            "trained_on": plan.split.trained_on(index),
        },
    )


def _collect(store: Store, plan: _Plan, roles: Sequence[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Pool], list[tuple[str, str]]]:
    """Collects the records of all batches: the columns of the samples, each layer's pool of inner products, the unreadable images."""
    pools = {layer: Pool(roles) for layer in plan.layers}
    parts: list[dict[str, NDArray[Any]]] = []
    unreadable: list[tuple[str, str]] = []
    for batch in range(len(plan.batches)):
        record = store.read_batch(batch)
        unreadable += record.unreadable
        for layer, pool in pools.items():
            pool.add(*record.layers[layer])
        count = len(record.columns[schema.INDEX])
        position = {schema.ROW: batch * plan.widest + np.arange(count), schema.BATCH: np.full(count, batch)}
        parts.append(position | record.columns)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, pools, unreadable


def _gallery(columns: Mapping[str, NDArray[Any]], roles: Sequence[str], options: RunOptions) -> NDArray[np.int64]:
    """The rows of the gallery's images: balanced over classes, a third of them misclassified by at least one network."""
    wrong = np.flatnonzero(np.any([columns[schema.prediction_column(role)] != columns[schema.LABEL] for role in roles], axis=0))
    picked: NDArray[np.int64] = np.empty(0, np.int64)
    if len(wrong):
        picked = wrong[class_balanced_sample(columns[schema.LABEL][wrong], max(1, options.gallery // 3), options.seed)]
    rest = np.setdiff1d(np.arange(len(columns[schema.LABEL])), picked)
    more = min(options.gallery - len(picked), len(rest))
    if more > 0:
        picked = np.concatenate([picked, rest[class_balanced_sample(columns[schema.LABEL][rest], more, options.seed)]])
    return np.sort(picked)
