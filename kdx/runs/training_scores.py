"""The scores of a student during its training, which `kdx distill --probe` logged: read for a run, and stored in its folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from kdx.disk import parse_json, write_atomic
from kdx.distill.settings import epoch_quality
from kdx.models.models_file import ModelsFile
from kdx.roles import SCORES
from kdx.runs import schema
from kdx.runs.record import LostResult


@dataclass(frozen=True)
class TrainingScores:
    """The scores of a probe after every epoch.

    images: how many it has; None if that is not known. epochs: their numbers, counted from 1. kept: the one whose weights were kept; None
    if that is not known. layers: layer -> score -> one value per epoch; None where there is none.
    """

    images: int | None
    epochs: list[int]
    kept: int | None
    layers: dict[str, dict[str, list[float | None]]]


def logged_scores(models: ModelsFile, announce: Callable[[str], None]) -> TrainingScores | None:
    """The scores that the training of a models file logged, or None if it names none. A file that cannot be read is announced."""
    name = models.training.get("probe")
    if not isinstance(name, str):
        return None
    path, images = models.path.parent / name, models.training.get("probe_images")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        scores = _scores(rows, images if isinstance(images, int) else None, str(models.training.get("select", "accuracy")))
    except (OSError, TypeError, ValueError, KeyError, UnicodeError, csv.Error):
        announce(f"The page does not show the scores during training, because {path} cannot be read.")
        return None
    return scores if scores.epochs and scores.layers else None


def _scores(rows: list[dict[str, float]], images: int | None, select: str) -> TrainingScores:
    columns = [column for column in dict.fromkeys(key for row in rows for key in row) if column.rpartition("/")[2] in SCORES]
    layers: dict[str, dict[str, list[float | None]]] = {}
    for column in columns:
        layer, _, score = column.rpartition("/")
        values = [row.get(column) for row in rows]
        layers.setdefault(layer, {})[score] = [value if value is not None and math.isfinite(value) else None for value in values]
    return TrainingScores(images, [int(row["epoch"]) for row in rows], _kept(rows, select), layers)


def _kept(rows: list[dict[str, float]], select: str) -> int | None:
    """The epoch whose weights `kdx distill` kept."""
    if not rows or not all({"accuracy", "entropy"} <= row.keys() for row in rows):
        return None

    def quality(row: Mapping[str, float]) -> tuple[list[float], float]:
        epoch = int(row["epoch"])
        return epoch_quality(select, epoch, row["accuracy"], row["entropy"]), epoch

    return int(max(rows, key=quality)["epoch"])


def write_training_scores(run: Path, scores: TrainingScores) -> None:
    write_atomic(run / schema.TRAINING_FILE, (json.dumps(asdict(scores), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_training_scores(run: Path) -> TrainingScores | None:
    """The scores that a run stored; None if it has none. Raises LostResult for a damaged file."""
    path = run / schema.TRAINING_FILE
    if not path.exists():
        return None
    try:
        scores = TrainingScores(**parse_json(path.read_text("utf-8")))
        if not scores.epochs:
            raise ValueError("no epochs")
        for values in (values for by_score in scores.layers.values() for values in by_score.values()):
            if len(values) != len(scores.epochs) or not all(value is None or math.isfinite(value) for value in values):
                raise ValueError("not one number per epoch")
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise LostResult(f"{path} cannot be read: {error}.", "Run the same kdx explain command again; it writes the file again.") from error
    return scores
