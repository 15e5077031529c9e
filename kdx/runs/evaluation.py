"""What `kdx evaluate` measured of a run's maps: evaluation.json and evaluation.parquet in the run's folder.

evaluation.json     per metric: what its results depend on, and per map and layer the mean over the images with its interval
evaluation.parquet  one row per image of samples.parquet, in its order: one column per metric, map and layer; null for other images
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.disk import parse_json, write_atomic
from kdx.remote import remote_errors
from kdx.runs import schema
from kdx.runs.record import RunRecord
from kdx.scores.uncertainty import t_quantile, wilson

FORMAT = 1

STEP = "to "
"""The beginning of the part of a metric that is a step, followed by the layer that it reaches from the output."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """One metric of the maps of one candidate at one layer, over n images.

    metric, part: the metric, and which of its numbers this is; part is "" for a metric of one number. candidate: the evaluated map
    (`kdx.evaluate.candidates`). layer: the student's layer, or None for a map that has no layer. value: the mean over the images.
    interval: its confidence interval over images (`mean_interval`); it does not describe how the value varies between trainings.
    n: the images whose value is known. empty: the share of images whose map has no positive value.
    """

    metric: str
    candidate: str
    layer: str | None
    part: str
    value: float
    interval: tuple[float, float]
    n: int
    empty: float

    @property
    def number(self) -> str:
        """The name of the values per image, as `kdx.open_run(...).number` takes it."""
        return number_name(self.layer, self.candidate, self.metric, self.part)


@dataclass(frozen=True)
class MetricRecord:
    """A metric as its results describe it.

    title, meaning: for readers. better: ``higher`` or ``lower``; None for a number that is neither. chance: the value of a map that states
    nothing, where it is the same for all images. basis: what the results depend on: the images, the seed, the masks, and options.
    """

    title: str
    meaning: str
    better: str | None
    chance: float | None
    basis: Mapping[str, Any]


@dataclass(frozen=True)
class CandidateRecord:
    """An evaluated map as results describe it. kind: ``run`` for a stored map, ``other`` for another method, or ``baseline``."""

    title: str
    meaning: str
    kind: str


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured of a run's maps.

    measurements: in the order of metrics, maps and layers. metrics, candidates: what they are, by name. values: per image [N] in the order
    of samples.parquet, by `Measurement.number`; NaN for images that were not evaluated. confidence: of the intervals.
    """

    measurements: tuple[Measurement, ...]
    metrics: Mapping[str, MetricRecord]
    candidates: Mapping[str, CandidateRecord]
    values: Mapping[str, Values]
    confidence: float

    def parts(self, metric: str) -> tuple[str, ...]:
        """The parts of a metric, in order, except its steps: "" for a metric of one number."""
        return tuple(part for part in self._parts(metric) if not part.startswith(STEP))

    def steps(self, metric: str) -> tuple[str, ...]:
        """The parts of a metric that are steps on the way to its main number, such as those of a cascade; most metrics have none."""
        return tuple(part for part in self._parts(metric) if part.startswith(STEP))

    def _parts(self, metric: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(measurement.part for measurement in self.measurements if measurement.metric == metric))

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of all measurements."""
        return tuple(dict.fromkeys(measurement.layer for measurement in self.measurements if measurement.layer is not None))

    def of(self, metric: str, layer: str | None, part: str = "") -> list[Measurement]:
        """The measurements of a metric at a layer, with those of maps that have no layer."""
        chosen = (m for m in self.measurements if m.metric == metric and m.part == part)
        return [measurement for measurement in chosen if measurement.layer in (layer, None)]

    def difference(self, first: Measurement, second: Measurement) -> tuple[float, tuple[float, float]]:
        """The mean over images of the difference first - second, and its interval, from the images that have both values (paired)."""
        difference = self.values[first.number] - self.values[second.number]
        return mean_interval(difference[np.isfinite(difference)], self.confidence)


def number_name(layer: str | None, candidate: str, metric: str, part: str = "") -> str:
    """The name of a metric's values per image: LAYER/CANDIDATE/METRIC, with [PART] where a metric has several numbers."""
    name = f"{metric}[{part}]" if part else metric
    return f"{candidate}/{name}" if layer is None else schema.map_column(layer, candidate, name)


def mean_interval(values: Values, confidence: float, *, hits: bool = False) -> tuple[float, tuple[float, float]]:
    """The mean of values [n], one per image, and its confidence interval.

    It is Student's interval, mean +/- t s/sqrt(n) with n - 1 degrees of freedom. For ``hits`` that are all 0 or 1, it is Wilson's interval
    of a share. Both treat images as independent. The interval is NaN for fewer than 2 images, and so is the mean of none.
    """
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return mean, (math.nan, math.nan)
    if hits and np.isin(values, (0, 1)).all():
        return mean, wilson(int(values.sum()), n, confidence)
    half = t_quantile(confidence, n) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, (mean - half, mean + half)


# ---------------------------------------------------------------- the files


def read_evaluation(run: RunRecord) -> Evaluation | None:
    """The evaluation of a run; None if there is none, or if the run was computed again since, or a file is damaged."""
    stored = _stored(run)
    if stored is None:
        return None
    try:
        measurements = [
            Measurement(
                metric,
                str(row["candidate"]),
                row["layer"],
                str(row["part"]),
                _number(row["value"]),
                (_number(row["interval"][0]), _number(row["interval"][1])),
                int(row["n"]),
                float(row["empty"]),
            )
            for metric, content in stored["metrics"].items()
            for row in content["measurements"]
        ]
        metrics = {
            name: MetricRecord(*(content[key] for key in ("title", "meaning", "better", "chance", "basis")))
            for name, content in stored["metrics"].items()
        }
        candidates = {name: CandidateRecord(**content) for name, content in stored["candidates"].items()}
        if not {measurement.candidate for measurement in measurements} <= candidates.keys():
            raise ValueError("a candidate is not described")
        values = _read_values(run, [measurement.number for measurement in measurements])
        return Evaluation(tuple(measurements), metrics, candidates, values, float(stored["confidence"]))
    except (KeyError, TypeError, ValueError, AttributeError, OSError):  # such an evaluation is computed again
        return None


def write_evaluation(run: RunRecord, evaluation: Evaluation) -> None:
    """Write both files, the values per image first, so that evaluation.json never names values that do not exist."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {schema.ROW: pa.array(run.samples.rows), schema.ID: pa.array(run.samples.ids)}
    columns |= {name: pa.array(values, from_pandas=True) for name, values in evaluation.values.items()}
    table = io.BytesIO()
    pq.write_table(pa.table(columns), table)
    write_atomic(run.folder / schema.EVALUATION_TABLE, table.getvalue())
    write_measurements(run, evaluation)


def write_measurements(run: RunRecord, evaluation: Evaluation) -> None:
    """Write evaluation.json alone. The table may have columns that it does not name."""
    metrics: dict[str, Any] = {name: {**asdict(metric), "measurements": []} for name, metric in evaluation.metrics.items()}
    for measurement in evaluation.measurements:
        metrics[measurement.metric]["measurements"].append(
            {
                "candidate": measurement.candidate,
                "layer": measurement.layer,
                "part": measurement.part,
                "value": _json_number(measurement.value),
                "interval": [_json_number(end) for end in measurement.interval],
                "n": measurement.n,
                "empty": measurement.empty,
            }
        )
    content = {
        "format": FORMAT,
        "run": _identity(run),
        "confidence": evaluation.confidence,
        "candidates": {name: asdict(candidate) for name, candidate in evaluation.candidates.items()},
        "metrics": metrics,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(run.folder / schema.EVALUATION_FILE, text.encode("utf-8", "replace"))


def evaluated_names(run: RunRecord) -> tuple[str, ...]:
    """The names of the values per image that the run's evaluation has."""
    stored = _stored(run)
    if stored is None:
        return ()
    try:
        return tuple(
            number_name(row["layer"], row["candidate"], metric, row["part"])
            for metric, content in stored["metrics"].items()
            for row in content["measurements"]
        )
    except (KeyError, TypeError, AttributeError):
        return ()


def evaluated_number(run: RunRecord, name: str) -> Values:
    """The values of this name for every image [N]; NaN for images that were not evaluated. Raises KeyError where there are none."""
    return _read_values(run, [name])[name]


def _stored(run: RunRecord) -> dict[str, Any] | None:
    """The content of evaluation.json, if it is about this run as it is now."""
    try:
        content = parse_json((run.folder / schema.EVALUATION_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    current = isinstance(content, dict) and content.get("format") == FORMAT and content.get("run") == _identity(run)
    return content if current else None


def _read_values(run: RunRecord, names: Sequence[str]) -> dict[str, Values]:
    import pyarrow
    import pyarrow.parquet

    path: Path = run.folder / schema.EVALUATION_TABLE
    try:
        with remote_errors(path), path.open("rb") as file:
            table = pyarrow.parquet.read_table(file, columns=list(names))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if table.num_rows != len(run.samples.ids):
        raise ValueError(f"{path} has {table.num_rows} rows")
    return {name: np.asarray(table[name].to_numpy(), dtype=np.float64) for name in names}


def _identity(run: RunRecord) -> dict[str, Any]:
    """What changes when the run is computed again."""
    return {"finished": run.manifest.get("finished"), "images": run.explained}


def _number(stored: float | None) -> float:
    return math.nan if stored is None else float(stored)


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
