"""A finished run, read back from its folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdx.errors import KdxError
from kdx.reading import CONTRASTS, Entry
from kdx.store import FORMAT

ROLES = ("teacher", "base", "student")
SCORES = ("FSS(S,T)", "FSS(B,T)", "RS(T)", "RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)", "RS(T|S)", "RS(S|T)")
"""In the order in which a reader meets them."""

_COLUMNS = ("row", "id", "label", *(f"{role}_{what}" for role in ROLES for what in ("prediction", "confidence")))
_AGAIN = "Run the same kdx explain command again; it resumes where it stopped and writes what is missing."


@dataclass(frozen=True)
class FinishedRun:
    """A complete run as its folder holds it."""

    folder: Path
    manifest: dict[str, Any]
    accuracy: dict[str, Entry]
    correct: dict[str, tuple[int, int]]  # role -> (correct, n)
    layers: dict[str, str]  # student layer -> teacher layer
    scores: dict[str, dict[str, Entry]]
    contrasts: dict[str, dict[str, Entry]]
    samples: list[dict[str, Any]]

    @property
    def configuration(self) -> dict[str, Any]:
        configuration: dict[str, Any] = self.manifest["configuration"]
        return configuration

    @property
    def confidence(self) -> float:
        return float(self.configuration["confidence"])

    def class_name(self, index: int) -> str:
        """A class by number; a network may predict one that the data set has no name for."""
        names = self.manifest["classes"]
        return str(names[index]) if 0 <= index < len(names) else f"class {index}"


@contextlib.contextmanager
def mending(run: Path) -> Iterator[None]:
    """What is missing inside a run's files is the folder's fault, not the program's: say so with the mend."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OSError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise KdxError(f"The run in {run} cannot be read: {what}.", _AGAIN) from error


def load(run: Path) -> FinishedRun:
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
            raise KdxError(f"The run in {run} has no {name}.", _AGAIN)
    layers = {str(student): str(teacher) for student, teacher in manifest["configuration"]["layers"].items()}
    return FinishedRun(
        run,
        manifest,
        {role: Entry.of(stored["accuracy"][role]) for role in ROLES},
        {role: (int(stored["accuracy"][role]["correct"]), int(stored["accuracy"][role]["n"])) for role in ROLES},
        layers,
        {layer: {name: Entry.of(stored["layers"][layer]["scores"][name]) for name in SCORES} for layer in layers},
        {layer: {name: Entry.of(stored["layers"][layer]["contrasts"][name]) for name in CONTRASTS} for layer in layers},
        _samples(run),
    )


def _json(run: Path, name: str) -> dict[str, Any]:
    path = run / name
    if not path.is_file():
        raise KdxError(f"The run in {run} has no {name}.", _AGAIN)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KdxError(f"{path} is not readable as JSON ({error}).", _AGAIN) from error
    if not isinstance(held, dict):
        raise KdxError(f"{path} does not hold what a run writes there.", _AGAIN)
    return held


def _samples(run: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        held = pyarrow.parquet.read_table(run / "samples.parquet", columns=list(_COLUMNS))
    except pyarrow.ArrowException as error:
        raise ValueError(f"samples.parquet: {error}") from error
    missing = [name for name in _COLUMNS if name not in held.column_names]
    if missing:
        raise ValueError(f"samples.parquet has no column {missing[0]}")
    rows: list[dict[str, Any]] = held.to_pylist()
    return rows
