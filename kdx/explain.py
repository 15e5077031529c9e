"""A run over a data set: plan batches, infer, measure, store; resumes where it stopped."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from kdx import report
from kdx.arrays import MIN_IMAGES
from kdx.console import progress
from kdx.data import Dataset, Images, class_balanced_sample, decoded, load_images, open_data, random_batches, split
from kdx.errors import KdxError
from kdx.explainer import Explainer, Features, largest_size
from kdx.finished import LostResult
from kdx.models_file import ModelsFile, parse_layers, read_models
from kdx.runner import Precision
from kdx.runtime import RuntimeName, is_file
from kdx.scores import permutation_table
from kdx.sources import describe_explainer, paired_layers, without_references
from kdx.store import Batch, Store
from kdx.transfer import LayerScores, Measured, Pool, moved_among, roles_among
from kdx.unicam import ObjectiveName, Weighting

_CHANGES_NO_RESULT = ("chunk", "max_unreadable", "gallery", "workers")
_OF_FEATURES = ("features", "keep", "noise")
_OF_A_MODEL = ("reference", "sha256", "parameters", "preprocessing")
_PACKAGES = ("kdx", "torch", "numpy", "scipy", "onnx", "onnxruntime", "openvino", "zarr", "pyarrow", "pillow")


@dataclass(frozen=True)
class Options:
    """How a run explains.

    batch: images whose geometry makes one set of maps; chunk: images through a network at once (it changes no result).
    reference_images: m > 0 maps every image among the same m class-balanced images instead of its batch mates.
    split: ``test``, ``validation``, ``train`` or ``all``; None takes ``test`` of the data that the models were trained on, and all
    of any other. features, keep, noise: what the scores are of, as in `kdx.Explainer`. max_unreadable: the share of corrupt
    images past which the run fails; one image always passes, unless the share is 0. gallery: images shown in the report. workers:
    threads that decode the next batches while one is explained; None takes one a core, 0 decodes each batch in its turn.
    """

    batch: int = 64
    chunk: int | None = None
    runtime: RuntimeName = "auto"
    device: str = "auto"
    precision: Precision = "float32"
    objective: ObjectiveName = "relevance"
    weighting: Weighting = "gap"
    reference_images: int = 0
    split: str | None = None
    features: Features = "raw"
    keep: float = 0.5
    noise: float = 0.0
    seed: int = 0
    permutations: int = 999
    confidence: float = 0.95
    max_unreadable: float = 0.01
    gallery: int = 60
    workers: int | None = None


def run(
    data: str,
    models: Path,
    out: Path,
    layers: Sequence[str] = (),
    options: Options = Options(),
    *,
    networks: Path | None = None,
    command: Sequence[str] = (),
    announce: Callable[[str], None] = print,
) -> Path:
    """Explain ``data`` by the networks of a models file, or by an explainer file, into the folder ``out``; return the page's path.

    layers: names shared by the networks, or ``student_layer=teacher_layer``; those of the models file where none is given.
    networks: where exported networks are kept (out/networks by default). A run that was stopped takes up where it was,
    with the same result; a finished one is not computed again, unless something of it is lost.

    Raises KdxError for whatever the user can mend, before anything is written where that can be told so early.
    """
    if options.reference_images and options.reference_images < MIN_IMAGES:
        raise KdxError(f"A reference set of {options.reference_images} is too small.", f"Give --reference {MIN_IMAGES} or more, or 0.")
    named = _of_file(models) if is_file(models) else read_models(models)
    dataset = open_data(data, named.classes or None)
    share, indices, pool = _part(dataset, named, options)
    paired = parse_layers(layers or named.layers)
    batches = random_batches(dataset.labels[indices], options.batch, options.seed)
    references = pool[:0]
    if options.reference_images:
        references = pool[class_balanced_sample(dataset.labels[pool], options.reference_images, options.seed)]
    with ExitStack() as held:
        with _explainer(named, paired, options, networks or out / "networks") as explainer:
            described = explainer.networks()
            size = largest_size(network["image_size"] for network in described.values())
            configuration = {
                "data": data,
                "split": share,
                "fingerprint": dataset.fingerprint,
                "split_seed": named.seed,
                "models": {role: {key: about[key] for key in _OF_A_MODEL} for role, about in described.items()},
                "layers": paired,
                "image_size": size,
                **_said_of(options),
            }
            rest = {
                "kdx": version("kdx"),
                "created": _now(),
                "command": list(command),
                "environment": environment(),
                "classes": list(dataset.classes),
                "method": named.training.get("method"),
                "batches": len(batches),
            }
            store = held.enter_context(Store.begin(out, configuration, rest))
            if store.complete:
                try:
                    page = report.write(out)
                except LostResult as error:
                    announce(f"{error.problem} It is computed again.")
                    store.restart()
                else:
                    announce(f"{out} is complete already; its page is written again.")
                    return page
            explainer.open(size)
            announce(f"Runtime {explainer.choice.why}.")
            store.manifest["environment"]["runtime"] = f"{explainer.choice.runtime} on {explainer.choice.device}"
            store.manifest["random_weights"] = [role for role, about in described.items() if not about["trained"]]
            for role in store.manifest["random_weights"]:
                announce(f"The {role} has random weights, wholly or in part: {described[role]['reference']}.")
            if len(references):
                store.manifest["reference_ids"] = [dataset.ids[index] for index in references]
            pending = [batch for batch in range(len(batches)) if not store.has(batch)]
            if pending and len(pending) < len(batches):
                announce(f"Resuming: {len(batches) - len(pending)} of {len(batches)} batches are done.")
            if len(references) and pending:
                _use_references(explainer, dataset, references, size)
            unreadable: list[tuple[str, str]] = []
            planned = (indices[batches[batch]] for batch in pending)
            with decoded(dataset, planned, size, options.workers) as found, progress() as show:
                for done, (batch, images) in enumerate(zip(pending, found, strict=True), len(batches) - len(pending)):
                    show("Explaining", done, len(batches), "batches")
                    _explain_batch(store, explainer, dataset, images, batch, batches, options)
                    unreadable += images.unreadable
                    _check_unreadable(unreadable, len(indices), options.max_unreadable)  # early, not after the last batch
                show("Explaining", len(batches), len(batches), "batches")
        _finish(store, dataset, batches, options, size)
        return report.write(out)


def _said_of(options: Options) -> dict[str, Any]:
    """What a run's configuration says of its options: those that its results depend on.

    Raw features and float32 go unsaid, so that runs from before there was anything else are still the same.
    """
    said = {key: value for key, value in asdict(options).items() if key not in ("split", "precision", *_OF_FEATURES, *_CHANGES_NO_RESULT)}
    if options.precision != "float32":
        said["precision"] = options.precision
    if options.features == "salient":
        said["features"] = {"kind": options.features, "keep": options.keep, "noise": options.noise}
    return said


def _part(dataset: Dataset, named: ModelsFile, options: Options) -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    """The split to explain, its indices, and those that a reference set is taken from: training images, where there are any."""
    own = named.data is not None and Path(dataset.reference).resolve() == Path(named.data).resolve()  # however the folder is spelt
    share = options.split or ("test" if own else "all")
    if share == "all":
        return share, np.arange(len(dataset)), np.arange(len(dataset))
    parts = split(dataset, named.seed if named.seed is not None else options.seed)
    if share not in parts:
        raise KdxError(f"There is no split {share!r}.", f"Choose one of {', '.join(parts)}, all.")
    return share, parts[share], parts["train"]


def _of_file(path: Path) -> ModelsFile:
    """What a models file would say of the networks in an explainer file."""
    file = describe_explainer(path)
    layers = tuple(f"{layer}={other}" for layer, other in paired_layers(file).items())
    base, student, teacher = (file.networks[role].reference if role in file.networks else None for role in ("base", "student", "teacher"))
    assert base is not None and student is not None
    return ModelsFile(path, base, student, teacher, layers, file.classes)


def _explainer(named: ModelsFile, layers: Mapping[str, str], options: Options, folder: Path) -> Explainer:
    given: dict[str, Any]
    if is_file(named.path):
        if options.reference_images:
            raise without_references()
        given = {"file": named.path}
    else:
        given = {
            role: named.path.parent / reference if is_file(reference) else named.load(role) for role, reference in named.references.items()
        }
    return Explainer(
        **given,
        layers=layers,
        runtime=options.runtime,
        device=options.device,
        precision=options.precision,
        objective=options.objective,
        weighting=options.weighting,
        chunk=options.chunk,
        folder=folder,
        features=options.features,
        keep=options.keep,
        noise=options.noise,
    )


def _use_references(explainer: Explainer, dataset: Dataset, chosen: NDArray[np.int64], size: tuple[int, int]) -> None:
    images = load_images(dataset, chosen, size)
    if images.unreadable:
        name, reason = images.unreadable[0]
        raise KdxError(
            f"The reference image {name} cannot be read ({reason}).", "Repair or remove it, or choose others with another --seed."
        )
    explainer.use_references(images.pixels, torch.from_numpy(dataset.labels[images.kept]))


def _explain_batch(
    store: Store,
    explainer: Explainer,
    dataset: Dataset,
    images: Images,
    batch: int,
    batches: Sequence[NDArray[np.int64]],
    options: Options,
) -> None:
    """Explain and store one batch."""
    labels = torch.from_numpy(dataset.labels[images.kept])
    seed = options.seed, batch
    permutations = permutation_table(len(labels), options.permutations, seed)
    logits, measured = explainer.explain(images.pixels, labels, permutations, seed)
    _check_classes(logits, len(dataset.classes))
    arrays: dict[str, NDArray[Any]] = {"index": images.kept}
    for role, rows in logits.items():
        confidence, prediction = rows.float().softmax(1).max(1)
        arrays[f"{role}_prediction"], arrays[f"{role}_confidence"] = prediction.numpy(force=True), confidence.numpy(force=True)
    for layer, found in measured.items():
        arrays |= _to_arrays(layer, found, keep_left_out=len(batches) == 1)
    maps = {layer: {name: value.maps.float().numpy(force=True) for name, value in found.maps.items()} for layer, found in measured.items()}
    most = max(map(len, batches))
    store.write_batch(batch, most, most * len(batches), maps, Batch(arrays, images.unreadable))


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


def _finish(store: Store, dataset: Dataset, batches: Sequence[NDArray[np.int64]], options: Options, size: tuple[int, int]) -> None:
    """Scores and samples from the batches' records, the gallery's pictures, and the end of the manifest."""
    configuration = store.manifest["configuration"]
    layers, roles = configuration["layers"], roles_among(configuration["models"])
    pools = {layer: Pool(roles) for layer in layers}
    parts: list[dict[str, NDArray[Any]]] = []
    unreadable: list[tuple[str, str]] = []
    planned, most = sum(map(len, batches)), max(map(len, batches))
    for batch in range(len(batches)):
        record = store.read_batch(batch)
        unreadable += record.unreadable
        for layer in layers:
            pools[layer].add(*_from_arrays(record.arrays, layer, roles))
        count = len(record.arrays["index"])
        place = {"row": batch * most + np.arange(count), "batch": np.full(count, batch)}
        parts.append(place | {name: values for name, values in record.arrays.items() if "/" not in name})
    _check_unreadable(unreadable, planned, options.max_unreadable)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    index = columns.pop("index")
    columns["label"] = dataset.labels[index]
    store.write_samples({"id": [dataset.ids[i] for i in index], **columns})
    store.write_scores(
        {
            "features": configuration.get("features", {"kind": "raw"}),
            "accuracy": {role: _accuracy(columns[f"{role}_prediction"] == columns["label"], options.confidence) for role in roles},
            "layers": {layer: _as_json(pool.scores(n=len(index), confidence=options.confidence)) for layer, pool in pools.items()},
        }
    )
    chosen = _gallery(columns, roles, options)
    shown = load_images(dataset, index[chosen], size)
    for row, pixels in zip(columns["row"][chosen], shown.pixels, strict=True):
        store.write_picture(int(row), pixels.mul(255).round().byte().permute(1, 2, 0).numpy())
    store.finish(
        {
            "finished": _now(),
            "images": {
                "planned": planned,
                "explained": len(index),
                "unreadable": [{"id": name, "reason": reason} for name, reason in unreadable],
            },
        }
    )


def _to_arrays(layer: str, found: Measured, keep_left_out: bool) -> dict[str, NDArray[Any]]:
    """What pooling needs of a batch's layer, under names that hold the layer behind a slash."""
    arrays = {f"products/{layer}": found.products.numpy(force=True)}
    arrays |= {f"moved_{name}/{layer}": rows.numpy(force=True) for name, rows in found.moved.items()}
    if keep_left_out and found.left_out is not None:
        arrays[f"left_out/{layer}"] = found.left_out.numpy(force=True)
    return arrays


def _from_arrays(
    arrays: Mapping[str, NDArray[Any]], layer: str, roles: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
    moved = {name: torch.from_numpy(arrays[f"moved_{name}/{layer}"]) for name in moved_among(roles)}
    left_out = arrays.get(f"left_out/{layer}")
    return torch.from_numpy(arrays[f"products/{layer}"]), moved, None if left_out is None else torch.from_numpy(left_out)


def _as_json(found: LayerScores) -> dict[str, Any]:
    scores = {
        name: {"value": s.value, "interval": s.interval, "p_value": s.p_value, "n": s.n, "batches": s.batches}
        for name, s in found.scores.items()
    }
    counts = {"n": found.scores["RS(S)"].n, "batches": found.scores["RS(S)"].batches}
    contrasts = {
        name: {"value": value, "interval": interval, "p_value": None, **counts} for name, (value, interval) in found.contrasts.items()
    }
    return {"scores": scores, "contrasts": contrasts}


def _accuracy(right: NDArray[np.bool_], confidence: float) -> dict[str, Any]:
    """The share of images predicted right, with Wilson's interval."""
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(confidence, method="wilson")
    return {
        "value": float(right.mean()),
        "interval": [float(interval.low), float(interval.high)],
        "correct": int(right.sum()),
        "n": len(right),
    }


def _gallery(columns: Mapping[str, NDArray[Any]], roles: Sequence[str], options: Options) -> NDArray[np.int64]:
    """Positions of the gallery's images: class-balanced, a third of them from images that some network gets wrong."""
    wrong = np.flatnonzero(np.any([columns[f"{role}_prediction"] != columns["label"] for role in roles], axis=0))
    picked: NDArray[np.int64] = np.empty(0, np.int64)
    if len(wrong):
        picked = wrong[class_balanced_sample(columns["label"][wrong], max(1, options.gallery // 3), options.seed)]
    rest = np.setdiff1d(np.arange(len(columns["label"])), picked)
    more = min(options.gallery - len(picked), len(rest))
    if more > 0:
        picked = np.concatenate([picked, rest[class_balanced_sample(columns["label"][rest], more, options.seed)]])
    return np.sort(picked)


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "processor": _processor()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    """The processor's name, which Python's platform module leaves out on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
