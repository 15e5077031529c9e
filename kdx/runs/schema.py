"""The schema of a run's folder: the names of files, JSON keys, columns, Zarr paths and arrays, and the format number.

No other module defines them, except the arrays of progress/ (`kdx.runs.progress_records`) and the scores of classes and groups
(`kdx.runs.grouped_scores`). `kdx.runs.run` and `kdx.runs.store` write a
folder in this schema; `kdx.runs.record` reads it.

    manifest.json    everything needed to repeat the run, and whether it is complete
    samples.parquet  one row per image
    maps.zarr        LAYER/KIND [rows, h, w]: UniCAM's maps (`kdx.roles.MAPS`) and the maps that add up to a score
                     (`kdx.roles.SCORE_MAPS`). Kinds that involve the teacher exist only with a teacher.
    scores.json      accuracies, and per layer the scores and contrasts, of all images and of each class and group; scores.csv has those of
                     all images as a table, scores_by_class.csv and scores_by_group.csv those of classes and groups, if there are any
    influences.npz   contributions of the parts of the images to the scores (`kdx.runs.influences`), for differences between runs
    training.json    the scores of probe images during training, where kdx distill logged them
    report.html      the page
    gallery.json     which images the page shows: how they were chosen, and their rows in the order of the page
    evaluation.json  what kdx evaluate measured of the maps; evaluation.parquet has its values per image (`kdx.runs.evaluation`)
    overlays/        the gallery's pictures: ROW.png is an image, ROW_LAYER_KIND.png a map over it
    networks/        the networks as the runtime executes them
    progress/        one file per finished batch or layer, until the run is complete
    features/        the features of all images, until the run is complete; with --keep-features they are kept
    .lock            locked by the process that writes; empty
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from kdx.roles import LETTERS, READING_ORDER
from kdx.scores.pool import LayerScores
from kdx.scores.score import Score

FORMAT = 1
"""The number that a manifest states. It changes when an older kdx can no longer read a new run."""

# ---------------------------------------------------------------- the files


MANIFEST = "manifest.json"
SAMPLES_FILE = "samples.parquet"
MAPS_FILE = "maps.zarr"
SCORES_FILE = "scores.json"
SCORES_TABLE = "scores.csv"
GROUPED_TABLES = {"classes": "scores_by_class.csv", "groups": "scores_by_group.csv"}
INFLUENCES = "influences.npz"
TRAINING_FILE = "training.json"
OPTIONAL_RESULTS = (*GROUPED_TABLES.values(), INFLUENCES, TRAINING_FILE)
"""The results that some runs do not have. In the folder of a run that is computed again, those of the earlier run would stay."""
PAGE = "report.html"
IMAGES_PAGE = "images.html"
"""The page of a few images, in a folder that is not a run."""
GALLERY = "gallery.json"
EVALUATION_FILE = "evaluation.json"
EVALUATION_TABLE = "evaluation.parquet"
NETWORKS = "networks"
PROGRESS = "progress"
FEATURES = "features"
OVERLAYS = "overlays"


def batch_path(run: Path, batch: int) -> Path:
    """The file of a finished batch."""
    return run / PROGRESS / f"{batch:05d}.npz"


def layer_path(run: Path, place: int) -> Path:
    """The file of a finished layer of a run with the geometry ``whole``."""
    return run / PROGRESS / f"layer-{place:03d}.npz"


MAPS_PER_CHUNK = 64
"""The maps per chunk of maps.zarr in a run with the geometry ``whole``. In other runs a chunk is a batch."""


def picture_path(run: Path, row: int) -> Path:
    """The picture of a gallery image. ``row`` is the image's row in maps.zarr and its value of the column ``row`` in samples.parquet."""
    return run / OVERLAYS / f"{row:05d}.png"


def pictured_rows(run: Path) -> list[int]:
    """The rows of the gallery images, in ascending order."""
    stems = (path.stem for path in (run / OVERLAYS).glob("*.png"))
    return sorted(int(stem) for stem in stems if re.fullmatch(r"[0-9]{5,}", stem))


def overlay_path(run: Path, row: int, layer_name: str, kind: str) -> Path:
    """The picture of a map over its image. ``layer_name`` is the layer's name from `layer_file_names`."""
    return run / OVERLAYS / f"{row:05d}_{layer_name}_{kind}.png"


def may_precede_manifest(name: str) -> bool:
    """Whether this file may be in a folder that becomes a run's: a run that was killed at its start wrote it."""
    return name == NETWORKS or name.startswith(f".{MANIFEST}.")


def layer_file_names(layers: Sequence[str]) -> dict[str, str]:
    """A part of a file name per layer: the layer's own name where every file system accepts it, else a short form with a digest."""
    lower = Counter(layer.lower() for layer in layers)
    names = {}
    for layer in layers:
        # Some file systems do not distinguish names that differ only in case.
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", layer) and lower[layer.lower()] == 1:
            names[layer] = layer
        else:
            digest = hashlib.sha256(layer.encode("utf-8", "surrogatepass")).hexdigest()[:8]
            names[layer] = f"{re.sub(r'[^A-Za-z0-9]+', '-', layer)[:60].strip('-') or 'layer'}-{digest}"
    return names


def map_path(layer: str, kind: str) -> str:
    """The path of an array in maps.zarr: maps [rows, h, w], indexed by the column ``row`` of samples.parquet."""
    return f"{layer}/{kind}"


# ---------------------------------------------------------------- manifest.json


class StoredNetwork(TypedDict):
    reference: str
    sha256: str
    parameters: int | None
    preprocessing: NotRequired[Any]


StoredFeatures = TypedDict(
    "StoredFeatures",
    {
        "kind": str,
        "keep": NotRequired[float],
        "noise": NotRequired[float],
        "class": NotRequired[str],
        "score": NotRequired[str],
        "image": NotRequired[str],
    },
)
"""The features that the scores describe: ``kind`` is raw, or salient with its parameters. ``class``, ``score`` and ``image`` are
omitted at their defaults, predicted, logit and exact."""


class StoredOptions(TypedDict):
    """The options that a run's results depend on. Those that are not required are omitted at their defaults: float32, raw, distances
    between whole features, auto, float32, 0, 200 classes, summed ratios and pillow."""

    batch: int
    runtime: str
    device: str
    objective: str
    weighting: str
    reference_images: int
    seed: int
    permutations: int
    confidence: float
    precision: NotRequired[str]
    features: NotRequired[StoredFeatures]
    pooled: NotRequired[bool]
    geometry: NotRequired[str]
    stored_precision: NotRequired[str]
    project: NotRequired[int]
    max_classes: NotRequired[int]
    ratios: NotRequired[str]
    decoder: NotRequired[str]


class SplitRule(TypedDict):
    """validation_is_test: true where the data's validation images are the test split; kdx 0.1.0 did not have this rule."""

    validation_is_test: NotRequired[bool]


class NetworkDetails(TypedDict):
    """base_layers: the base's layers that have other names than the student's, by the student's. source_code: the hash of the source code
    of each network that is the user's own (`kdx.models.source_code`). Each is omitted if there are none."""

    base_layers: NotRequired[dict[str, str]]
    source_code: NotRequired[dict[str, str]]


class StoredTarget(TypedDict):
    """What relevance is measured against in place of labels.

    sha256: the hash of a file's rows, in the order of the classes or of the explained images, or of a network's weights. width: how many
    numbers a row of a file has. kind: prototypes, soft or images; absent for a file of class embeddings. layer, temperature: of a network.
    """

    sha256: str
    width: NotRequired[int]
    kind: NotRequired[str]
    layer: NotRequired[str]
    temperature: NotRequired[float]


class StoredResizing(TypedDict):
    mode: str
    interpolation: str


class StoredGrouping(TypedDict):
    """The groups of images: the column of a table, and the hash of the value of each explained image."""

    column: str
    sha256: str


class StoredInputs(TypedDict):
    """Omitted at their defaults: labels as the target, no groups, and images that cover the size, bicubic."""

    target: NotRequired[StoredTarget]
    groups: NotRequired[StoredGrouping]
    resize: NotRequired[StoredResizing]


class InputFiles(TypedDict):
    """target_file: the target as it was stated, by default a file of class embeddings; absent where labels are the target. models_file:
    the path of the models file, which starts at the run's folder unless it is absolute; absent for explainer files and in older runs."""

    target_file: NotRequired[str]
    models_file: NotRequired[str]


class Configuration(StoredOptions, SplitRule, StoredInputs, NetworkDetails):
    """Everything that a run's results depend on. ``fingerprint`` identifies the data, wherever its folder ``data`` is. layers: the
    student's layer to the teacher's, or to itself without a teacher."""

    data: str
    split: str
    fingerprint: str
    split_seed: int | None
    models: dict[str, StoredNetwork]
    layers: dict[str, str]
    image_size: Sequence[int]


class UnreadableImage(TypedDict):
    id: str
    reason: str


class ImageCounts(TypedDict):
    """trained_on: how many of the explained images were used in training; None, or absent in runs of kdx 0.1.0, where that is not known."""

    planned: int
    explained: int
    unreadable: list[UnreadableImage]
    trained_on: NotRequired[int | None]


class Context(InputFiles):
    """The part of a manifest that the results do not depend on."""

    kdx: str
    created: str
    command: list[str]
    environment: dict[str, Any]
    classes: list[str]
    method: str | None
    batches: int


class Manifest(Context):
    """failure: the error that ended an unfinished run. geometry: ``whole``, ``reference`` or ``batch``, chosen when the run started;
    geometry_reason: why. Runs of kdx 0.1.0 lack both."""

    format: int
    status: str
    configuration: Configuration
    random_weights: NotRequired[list[str]]
    geometry: NotRequired[str]
    geometry_reason: NotRequired[str]
    reference_ids: NotRequired[list[str]]
    failure: NotRequired[str]
    finished: NotRequired[str]
    images: NotRequired[ImageCounts]


RUNNING, COMPLETE = "running", "complete"
"""The values of a manifest's ``status``."""


# ---------------------------------------------------------------- scores.json and scores.csv


class StoredScore(TypedDict):
    value: float
    interval: Sequence[float]
    p_value: float | None
    p_adjusted: NotRequired[float | None]  # adjusted for the number of layers; runs before 0.2 do not have it
    n: int
    batches: int


class StoredMaps(TypedDict):
    """A kind of map at a layer, over all images: see `kdx.runs.measured.MapSummary`, which has the same fields."""

    empty: float
    strength: float
    stability: float | None
    null_strength: float | None
    above_null: float | None


class StoredGroup(TypedDict):
    """A class or group at a layer: see `kdx.scores.groups.GroupScores`, which has the same fields."""

    n: int
    scores: dict[str, StoredScore]
    contrasts: dict[str, StoredScore]
    missing: dict[str, str]


class StoredLayer(TypedDict):
    """classes, groups: by name; absent where the run has none, and in runs of older versions."""

    scores: dict[str, StoredScore]
    contrasts: dict[str, StoredScore]
    maps: NotRequired[dict[str, StoredMaps]]
    classes: NotRequired[dict[str, StoredGroup]]
    groups: NotRequired[dict[str, StoredGroup]]


class StoredScores(TypedDict):
    """left_out: why there are no scores of ``classes`` or of ``groups``, where there are none."""

    features: StoredFeatures
    accuracy: dict[str, dict[str, Any]]  # role -> value, interval, correct, n: see `kdx.scores.uncertainty.accuracy`
    layers: dict[str, StoredLayer]
    left_out: NotRequired[dict[str, str]]


def stored_layer(layer: LayerScores) -> StoredLayer:
    """The scores and contrasts of a layer in the form of scores.json."""
    scores = {name: stored_score(score) for name, score in layer.scores.items()}
    first = next(iter(scores.values()))  # all scores of a layer have the same basis
    contrasts: dict[str, StoredScore] = {
        name: {"value": value, "interval": interval, "p_value": None, "p_adjusted": None, "n": first["n"], "batches": first["batches"]}
        for name, (value, interval) in layer.contrasts.items()
    }
    return {"scores": scores, "contrasts": contrasts}


def stored_score(score: Score) -> StoredScore:
    """A score in the form of scores.json."""
    return {
        "value": score.value,
        "interval": score.interval,
        "p_value": score.p_value,
        "p_adjusted": score.p_adjusted,
        "n": score.n,
        "batches": score.batches,
    }


SCORES_TABLE_COLUMNS = ("layer", "score", "value", "low", "high", "p_value", "p_adjusted", "n", "batches")


def accuracy_name(role: str) -> str:
    """The name of a network's accuracy among the scores."""
    return f"accuracy({LETTERS[role]})"


def scores_table_rows(scores: StoredScores) -> Iterator[tuple[Any, ...]]:
    """The rows of scores.csv: the accuracy of every network, without a layer, then every score and contrast of every layer."""
    for role in (role for role in READING_ORDER if role in scores["accuracy"]):
        accuracy = scores["accuracy"][role]
        yield None, accuracy_name(role), accuracy["value"], *accuracy["interval"], None, None, accuracy["n"], None
    for layer, entry in scores["layers"].items():
        for name, score in (entry["scores"] | entry["contrasts"]).items():
            yield layer, name, score["value"], *score["interval"], score["p_value"], score.get("p_adjusted"), score["n"], score["batches"]


# ---------------------------------------------------------------- samples.parquet and progress/


ID, ROW, BATCH, LABEL = "id", "row", "batch", "label"
"""Columns of samples.parquet: the image's name, the row of its maps in maps.zarr, its batch, and its class."""

INDEX = "index"
"""The column of a batch's file with each image's index in the data set."""


def prediction_column(role: str) -> str:
    return f"{role}_prediction"


def confidence_column(role: str) -> str:
    return f"{role}_confidence"


MAP_COLUMNS = ("total", "strength", "stability")
"""What samples.parquet contains of each map: see `kdx.runs.record.MapColumns`."""


def map_column(layer: str, kind: str, name: str) -> str:
    return f"{layer}/{kind}/{name}"
