"""A complete run, read back from its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from kdx.disk import parse_json
from kdx.errors import KdxError
from kdx.remote import remote_errors, zarr_store
from kdx.roles import MEASURED, READING_ORDER, contrast_name, contrasts_among, maps_among, score_maps_among, scores_among
from kdx.runs import grouped_scores, schema
from kdx.runs.measured import Entry, GroupEntries, MapColumns, MapSummary, NetworkResult, Samples, optional_integer
from kdx.runs.schema import Manifest, StoredFeatures, StoredGroup, StoredScore, StoredScores, UnreadableImage

if TYPE_CHECKING:
    from PIL import Image

_NO_RUN = "Give the folder that kdx explain wrote; if it is this one, run the same kdx explain command again."
_RUN_AGAIN = "Run the same kdx explain command again; it computes what is missing."


class LostResult(KdxError):
    """A file of a complete run is missing or damaged. The same run writes it again."""


@dataclass(frozen=True)
class RunRecord:
    """A complete run. Roles are in READING_ORDER. Every layer has the same scores and contrasts, those that the run's roles have.

    ``batches`` and ``explained`` are numbers of batches and images. ``trained_on`` is the number of explained images that were used to
    train the networks or to choose their weights, or None where the run does not know it. ``kdx`` is the version that computed the run,
    ``date`` the day on which it finished.
    """

    folder: Path
    manifest: Manifest  # as stored
    stored_scores: StoredScores
    data: str
    split: str | None
    method: str | None
    classes: list[str]
    networks: dict[str, NetworkResult]
    layers: dict[str, str]  # student layer -> teacher layer, or itself without a teacher
    scores: dict[str, dict[str, Entry]]  # layer -> name -> entry
    contrasts: dict[str, dict[str, Entry]]
    map_summaries: dict[str, dict[str, MapSummary]]  # layer -> kind -> summary; empty for runs of older versions
    class_scores: dict[str, dict[str, GroupEntries]]  # layer -> class -> entries; empty for runs without them
    group_scores: dict[str, dict[str, GroupEntries]]
    samples: Samples
    confidence: float
    permutations: int | None
    reference_images: int
    salient: tuple[float, float, str, str, str] | None  # keep, noise, class, score and kind of salient images; None for raw features
    mean_of_ratios: bool  # whether scores are means of the batches' scores
    target_file: str | None  # the file of class embeddings that relevance is measured against; None for labels
    batches: int
    explained: int
    trained_on: int | None
    unreadable: list[UnreadableImage]
    kdx: str
    date: str
    command: list[str]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.networks)

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(next(iter(self.scores.values())))

    @property
    def contrast_names(self) -> tuple[str, ...]:
        return tuple(next(iter(self.contrasts.values())))

    def class_name(self, index: int) -> str:
        """The name of a class. A network may predict a class that the data set has no name for."""
        return self.classes[index] if 0 <= index < len(self.classes) else f"class {index}"

    @property
    def group_column(self) -> str | None:
        """The column whose values divide the images into groups; None without one."""
        groups = self.manifest["configuration"].get("groups")
        return None if groups is None else str(groups["column"])

    @property
    def left_out(self) -> dict[str, str]:
        """Why the run has no scores of ``classes`` or of ``groups``, where it has none and knows why."""
        return self.stored_scores.get("left_out", {})

    @property
    def geometry(self) -> str:
        """Which images an image is compared with: whole, reference or batch."""
        return self.manifest.get("geometry") or ("reference" if self.reference_images else "batch")

    @property
    def pooled(self) -> bool:
        """Whether distances are between the spatial means of features."""
        return bool(self.manifest["configuration"].get("pooled", False))

    @property
    def map_kinds(self) -> tuple[str, ...]:
        """The kinds of map that the run contains: UniCAM's, then those that add up to a score."""
        first = next(iter(self.layers))
        return (*maps_among(self.roles), *(kind for kind in score_maps_among(self.roles) if kind in self.map_summaries.get(first, {})))

    def map_columns(self, layer: str, kind: str) -> MapColumns | None:
        """The statistics of one kind of map per image; None for a run of an older version, which does not have them."""
        import pyarrow.parquet

        names = [schema.map_column(layer, kind, name) for name in schema.MAP_COLUMNS]
        with _damage_is_lost_result(self.folder):
            with (self.folder / schema.SAMPLES_FILE).open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
                if not set(names) <= set(table.schema_arrow.names):
                    return None
                columns = table.read(columns=names)
            return MapColumns(*(columns[name].to_numpy() for name in names))

    def maps(self, layer: str, kind: str, rows: Sequence[int]) -> NDArray[np.float32]:
        """The maps [len(rows), h, w] of these rows at their stored resolution. Raises LostResult where the run does not have them."""
        import zarr

        path = schema.map_path(layer, kind)
        with _damage_is_lost_result(self.folder):
            array = self._maps[path]
            if not isinstance(array, zarr.Array) or array.ndim != 3:
                raise ValueError(f"{schema.MAPS_FILE} has no array of maps [N, h, w] at {path}")
            if rows and max(rows) >= array.shape[0]:
                raise ValueError(f"{schema.MAPS_FILE} has {array.shape[0]} maps at {path}, and there is a picture for row {max(rows)}")
            return np.asarray(array.oindex[np.array(rows)]) if rows else np.empty((0, *array.shape[1:]), np.float32)

    @cached_property
    def _maps(self) -> Any:
        import zarr

        return zarr.open_group(zarr_store(self.folder / schema.MAPS_FILE, read_only=True), mode="r")

    def picture(self, row: int) -> Image.Image:
        """The picture of a gallery image, in RGB. Raises LostResult where it is missing or damaged."""
        from PIL import Image

        with (
            _damage_is_lost_result(self.folder),
            schema.picture_path(self.folder, row).open("rb") as file,
            Image.open(file) as picture,
        ):
            return picture.convert("RGB")


def read_run(folder: Path) -> RunRecord:
    """The complete run in a folder.

    Raises LostResult where a file is missing or damaged, and KdxError if there is no complete run or a newer kdx wrote it.
    """
    if not folder.is_dir():
        raise KdxError(f"There is no run folder at {folder}.", "Give the folder that kdx explain wrote, the one named with --out.")
    if (folder / schema.IMAGES_PAGE).exists() and not (folder / schema.MANIFEST).exists():
        raise KdxError(
            f"{folder} contains maps of a few images, which have no scores, and not a run over a data set.",
            f"Open {schema.IMAGES_PAGE} in it; to write it again, run the same kdx explain command again.",
        )
    with _damage_is_lost_result(folder):
        manifest = _complete_manifest(folder)
        stored = cast(StoredScores, _json(folder, schema.SCORES_FILE))
        for name in (schema.SAMPLES_FILE, schema.MAPS_FILE):
            if not (folder / name).exists():
                raise LostResult(f"The run in {folder} has no {name}.", _RUN_AGAIN)
        _check_tables(stored)
        configuration, images = manifest["configuration"], manifest["images"]
        roles = [role for role in READING_ORDER if role in configuration["models"]]
        layers = {str(student): str(teacher) for student, teacher in configuration["layers"].items()}
        if "student" not in roles or not layers:
            raise ValueError(f"{schema.MANIFEST} names no student or no layer")
        measured = [role for role in MEASURED if role in configuration["models"]]
        contrasts = [contrast_name(*pair) for pair in contrasts_among(measured)]
        features = configuration.get("features")
        return RunRecord(
            folder=folder,
            manifest=manifest,
            stored_scores=stored,
            data=str(configuration["data"]),
            split=configuration.get("split"),
            method=manifest.get("method"),
            classes=[str(name) for name in manifest["classes"]],
            networks={role: _network(role, manifest, stored["accuracy"][role]) for role in roles},
            layers=layers,
            scores={layer: _entries(stored["layers"][layer]["scores"], scores_among(measured)) for layer in layers},
            contrasts={
                layer: _entries(known, [name for name in contrasts if name in known])  # older versions had fewer contrasts
                for layer in layers
                for known in [stored["layers"][layer]["contrasts"]]
            },
            map_summaries={
                layer: {kind: MapSummary(**summary) for kind, summary in stored["layers"][layer].get("maps", {}).items()}
                for layer in layers
            },
            class_scores={layer: _groups(stored["layers"][layer].get("classes", {})) for layer in layers},
            group_scores={layer: _groups(stored["layers"][layer].get("groups", {})) for layer in layers},
            samples=_samples(folder, roles),
            confidence=float(configuration["confidence"]),
            permutations=optional_integer(configuration.get("permutations")),
            reference_images=len(manifest.get("reference_ids") or ()) or int(configuration["reference_images"] or 0),
            salient=_salient(features) if features else None,
            mean_of_ratios=configuration.get("ratios") == "mean",
            target_file=manifest.get("target_file"),
            batches=int(manifest["batches"]),
            explained=int(images["explained"]),
            trained_on=optional_integer(images.get("trained_on")),
            unreadable=[{"id": str(image["id"]), "reason": str(image["reason"])} for image in images.get("unreadable") or []],
            kdx=str(manifest["kdx"]),
            date=str(manifest.get("finished") or manifest["created"])[:10],
            command=[str(part) for part in manifest["command"]],
        )


def _check_tables(stored: StoredScores) -> None:
    """Check every row of the tables, which are made later, when a damaged value would look like a bug."""
    rows: list[tuple[tuple[Any, ...], tuple[Any, ...], Sequence[str]]] = [
        (row, row[2:], schema.SCORES_TABLE_COLUMNS) for row in schema.scores_table_rows(stored)
    ]
    for kind in schema.GROUPED_TABLES:  # their last column is a text
        rows += [(row, row[4:-1], grouped_scores.grouped_columns(kind)) for row in grouped_scores.grouped_rows(stored, kind)]
    for row, numbers, columns in rows:
        if len(row) != len(columns) or not all(number is None or isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{schema.SCORES_FILE} contains a score that is not a number")
    for entry in stored["layers"].values():
        for summary in entry.get("maps", {}).values():
            if not all(number is None or isinstance(number, int | float) for number in summary.values()):
                raise ValueError(f"{schema.SCORES_FILE} contains a summary of maps that is not a number")


@contextlib.contextmanager
def _damage_is_lost_result(folder: Path) -> Iterator[None]:
    """Raise LostResult for an error that a damaged file causes: the folder is at fault, not the program."""
    try:
        with remote_errors(folder):
            yield
    except KdxError:
        raise
    except Exception as error:  # a value of another type or shape raises almost any error, and so does a damaged map that is decompressed
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise LostResult(f"The run in {folder} cannot be read: {reason}.", _RUN_AGAIN) from error


def _complete_manifest(folder: Path) -> Manifest:
    manifest = _json(folder, schema.MANIFEST)
    written = manifest.get("format")
    if isinstance(written, int) and written > schema.FORMAT:
        raise KdxError(
            f"The run in {folder} was written in format {written}, and this kdx reads format {schema.FORMAT}.",
            "Upgrade kdx: pip install --upgrade kdx",
        )
    if written != schema.FORMAT:
        raise KdxError(f"{folder / schema.MANIFEST} is not the manifest of a run.", "Give the folder that kdx explain wrote.")
    if manifest.get("status") != schema.COMPLETE:
        images = manifest.get("images") or {}
        done = f": {images['explained']} of {images['planned']} images are explained" if {"explained", "planned"} <= set(images) else ""
        raise KdxError(
            f"The run in {folder} is not finished{done}.", "Run the same kdx explain command again; it resumes where it stopped."
        )
    return cast(Manifest, manifest)


def _json(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file() and name == schema.MANIFEST:
        raise LostResult(f"{folder} contains no run: it has no {name}.", _NO_RUN)
    if not file.is_file():
        raise LostResult(f"The run in {folder} has no {name}.", _RUN_AGAIN)
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LostResult(f"{file} is not readable as JSON ({error}).", _RUN_AGAIN) from error
    if not isinstance(content, dict):
        raise LostResult(f"{file} is not a JSON object.", _RUN_AGAIN)
    return content


def _salient(stored: StoredFeatures) -> tuple[float, float, str, str, str]:
    kinds = str(stored.get("class", "predicted")), str(stored.get("score", "logit")), str(stored.get("image", "exact"))
    return float(stored["keep"]), float(stored["noise"]), *kinds


def _network(role: str, manifest: Manifest, accuracy: Mapping[str, Any]) -> NetworkResult:
    stored = manifest["configuration"]["models"][role]
    random_weights = role in manifest.get("random_weights", [])
    return NetworkResult(
        str(stored["reference"]),
        optional_integer(stored.get("parameters")),
        random_weights,
        Entry.of(accuracy),
        int(accuracy["correct"]),
        int(accuracy["n"]),
    )


def _entries(stored: Mapping[str, StoredScore], names: Iterable[str]) -> dict[str, Entry]:
    """The entries of these names. Raises KeyError where one is missing."""
    return {name: Entry.of(stored[name]) for name in names}


def _groups(stored: Mapping[str, StoredGroup]) -> dict[str, GroupEntries]:
    return {str(name): GroupEntries.of(group) for name, group in stored.items()}


def _samples(folder: Path, roles: Sequence[str]) -> Samples:
    import pyarrow
    import pyarrow.parquet

    columns = [schema.ROW, schema.ID, schema.LABEL, *map(schema.prediction_column, roles), *map(schema.confidence_column, roles)]
    try:
        with (folder / schema.SAMPLES_FILE).open("rb") as file:
            table = pyarrow.parquet.read_table(file, columns=columns)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{schema.SAMPLES_FILE}: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{schema.SAMPLES_FILE} has no column {missing[0]}")
    incomplete = [name for name in columns if table[name].null_count]
    if incomplete:
        raise ValueError(f"{schema.SAMPLES_FILE} has missing values in the column {incomplete[0]}")
    arrays = {name: table[name].to_numpy() for name in columns if name != schema.ID}
    return Samples.of(arrays, [str(name) for name in table[schema.ID].to_pylist()], roles)
