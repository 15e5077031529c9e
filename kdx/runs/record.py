"""A finished run, read back from its folder."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from kdx.errors import KdxError
from kdx.explain.layer import LayerMeasurement
from kdx.roles import READING_ORDER, permuted_among
from kdx.runs.store import FORMAT
from kdx.scores.pool import LayerScores

_AGAIN = "Run the same kdx explain command again; it computes what is missing."


class LostResult(KdxError):
    """A file of a complete run is missing, or does not hold what the run wrote; the same run writes it again."""


@dataclass(frozen=True)
class FinishedRun:
    """A complete run as its folder holds it. Roles, scores and contrasts are those that the run has, in a reader's order."""

    folder: Path
    manifest: dict[str, Any]
    roles: tuple[str, ...]
    accuracy: dict[str, Entry]
    correct: dict[str, tuple[int, int]]  # role -> (correct, n)
    layers: dict[str, str]  # student layer -> teacher layer
    scores: dict[str, dict[str, Entry]]  # layer -> name -> entry; every layer has the same names
    contrasts: dict[str, dict[str, Entry]]
    samples: list[dict[str, Any]]

    @property
    def configuration(self) -> dict[str, Any]:
        configuration: dict[str, Any] = self.manifest["configuration"]
        return configuration

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(next(iter(self.scores.values())))

    @property
    def contrast_names(self) -> tuple[str, ...]:
        return tuple(next(iter(self.contrasts.values())))

    @property
    def confidence(self) -> float:
        return float(self.configuration["confidence"])

    def class_name(self, index: int) -> str:
        """A class by number; a network may predict one that the data set has no name for."""
        names = self.manifest["classes"]
        return str(names[index]) if 0 <= index < len(names) else f"class {index}"


@contextlib.contextmanager
def run_errors(run: Path) -> Iterator[None]:
    """What is missing inside a run's files is the folder's fault, not the program's: say so with the hint."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OSError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise LostResult(f"The run in {run} cannot be read: {what}.", _AGAIN) from error


def read_run(run: Path) -> FinishedRun:
    if not run.is_dir():
        raise KdxError(f"There is no run folder at {run}.", "Give the folder that kdx explain wrote, the one named with --out.")
    manifest = _json(run, "manifest.json")
    written = manifest.get("format")
    if isinstance(written, int) and written > FORMAT:
        raise KdxError(
            f"The run in {run} was written in format {written}, and this kdx reads format {FORMAT}.",
            "Upgrade kdx: pip install --upgrade kdx",
        )
    if written != FORMAT:
        raise KdxError(f"{run / 'manifest.json'} is not the manifest of a run.", "Give the folder that kdx explain wrote.")
    if manifest.get("status") != "complete":
        images = manifest.get("images") or {}
        done = f": {images['explained']} of {images['planned']} images are explained" if {"explained", "planned"} <= set(images) else ""
        raise KdxError(f"The run in {run} is not finished{done}.", "Run the same kdx explain command again; it resumes where it stopped.")
    stored = _json(run, "scores.json")
    for name in ("samples.parquet", "maps.zarr"):
        if not (run / name).exists():
            raise LostResult(f"The run in {run} has no {name}.", _AGAIN)
    roles = tuple(role for role in READING_ORDER if role in manifest["configuration"]["models"])
    layers = {str(student): str(teacher) for student, teacher in manifest["configuration"]["layers"].items()}
    return FinishedRun(
        run,
        manifest,
        roles,
        {role: Entry.of(stored["accuracy"][role]) for role in roles},
        {role: (int(stored["accuracy"][role]["correct"]), int(stored["accuracy"][role]["n"])) for role in roles},
        layers,
        _entries(stored, layers, "scores"),
        _entries(stored, layers, "contrasts"),
        _samples(run, roles),
    )


def _entries(stored: Mapping[str, Any], layers: Mapping[str, str], kind: str) -> dict[str, dict[str, Entry]]:
    """The scores or contrasts of each layer; KeyError where a layer lacks one that the first has."""
    names = stored["layers"][next(iter(layers))][kind]
    return {layer: {name: Entry.of(stored["layers"][layer][kind][name]) for name in names} for layer in layers}


def _json(run: Path, name: str) -> dict[str, Any]:
    path = run / name
    if not path.is_file():
        raise LostResult(f"The run in {run} has no {name}.", _AGAIN)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LostResult(f"{path} is not readable as JSON ({error}).", _AGAIN) from error
    if not isinstance(held, dict):
        raise LostResult(f"{path} does not hold what a run writes there.", _AGAIN)
    return held


def _samples(run: Path, roles: Sequence[str]) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    columns = ["row", "id", "label", *(f"{role}_{what}" for role in roles for what in ("prediction", "confidence"))]
    try:
        held = pyarrow.parquet.read_table(run / "samples.parquet", columns=columns)
    except pyarrow.ArrowException as error:
        raise ValueError(f"samples.parquet: {error}") from error
    missing = [name for name in columns if name not in held.column_names]
    if missing:
        raise ValueError(f"samples.parquet has no column {missing[0]}")
    rows: list[dict[str, Any]] = held.to_pylist()
    return rows


@dataclass(frozen=True)
class Entry:
    """One number of ``scores.json``: a score or a contrast, its interval, and what it rests on."""

    value: float
    interval: tuple[float, float]
    p_value: float | None = None
    n: int | None = None
    batches: int | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Entry:
        """The entry as stored; a null becomes NaN. Raises KeyError, TypeError or ValueError where it is not an entry at all."""
        low, high = (math.nan if x is None else float(x) for x in stored["interval"])
        value = math.nan if stored["value"] is None else float(stored["value"])
        return cls(value, (low, high), stored.get("p_value"), stored.get("n"), stored.get("batches"))

    @property
    def known(self) -> bool:
        """Whether value and interval are all finite."""
        return all(map(math.isfinite, (self.value, *self.interval)))

    @property
    def sign(self) -> int:
        """1 where the whole interval lies above zero, -1 below, 0 where it includes zero or is not known."""
        low, high = self.interval
        return int(low > 0) - int(high < 0) if self.known else 0

    def settled(self, confidence: float) -> bool:
        """Whether interval and permutation test, where there is one, both speak against zero at this confidence."""
        return self.sign != 0 and (self.p_value is None or self.p_value <= 1 - confidence + 1e-12)


def to_arrays(layer: str, found: LayerMeasurement, keep_left_out: bool) -> dict[str, NDArray[Any]]:
    """What pooling needs of a batch's layer, under names that hold the layer behind a slash."""
    arrays = {f"products/{layer}": found.products.numpy(force=True)}
    arrays |= {f"moved_{name}/{layer}": rows.numpy(force=True) for name, rows in found.permuted.items()}
    if keep_left_out and found.left_out is not None:
        arrays[f"left_out/{layer}"] = found.left_out.numpy(force=True)
    return arrays


def from_arrays(
    arrays: Mapping[str, NDArray[Any]], layer: str, roles: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
    moved = {name: torch.from_numpy(arrays[f"moved_{name}/{layer}"]) for name in permuted_among(roles)}
    left_out = arrays.get(f"left_out/{layer}")
    return torch.from_numpy(arrays[f"products/{layer}"]), moved, None if left_out is None else torch.from_numpy(left_out)


def scores_as_json(found: LayerScores) -> dict[str, Any]:
    scores = {
        name: {"value": s.value, "interval": s.interval, "p_value": s.p_value, "n": s.n, "batches": s.batches}
        for name, s in found.scores.items()
    }
    counts = {"n": found.scores["RS(S)"].n, "batches": found.scores["RS(S)"].batches}
    contrasts = {
        name: {"value": value, "interval": interval, "p_value": None, **counts} for name, (value, interval) in found.contrasts.items()
    }
    return {"scores": scores, "contrasts": contrasts}
