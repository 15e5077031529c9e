"""`evaluate`: metrics of the maps of a run, stored in its folder. A stopped evaluation resumes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kdx.disk import lock_folder
from kdx.errors import KdxError, resumable
from kdx.evaluate.candidates import ALL, Candidate, chosen, empty_share
from kdx.evaluate.cost import DEFAULT_MINUTES, Costs, affordable
from kdx.evaluate.metrics import LEAST, EvaluationOptions, Metric, Need, Task, Values, chosen_metrics
from kdx.evaluate.registry import METRICS
from kdx.evaluate.subject import Sources, Subject
from kdx.progress import Show, progress
from kdx.remote import as_path
from kdx.runs.evaluation import (
    Evaluation,
    Measurement,
    mean_interval,
    number_name,
    read_evaluation,
    write_evaluation,
    write_measurements,
)
from kdx.runs.record import RunRecord, read_run

DEFAULT_IMAGES = 200
"""The images that are evaluated, unless another number is given."""

_SECONDS_BETWEEN_WRITES = 10.0
"""A process that is killed loses at most the results of this time, and the map in progress."""


def evaluate(
    run: str | Path,
    *,
    masks: str | Path | None = None,
    metrics: Sequence[str] = (),
    maps: Sequence[str] = (),
    layers: Sequence[str] = (),
    images: int | None = DEFAULT_IMAGES,
    seed: int = 0,
    data: str | None = None,
    models: str | Path | None = None,
    device: str = "auto",
    max_minutes: float = DEFAULT_MINUTES,
    options: EvaluationOptions = EvaluationOptions(),
    announce: Callable[[str], None] = print,
) -> Evaluation:
    """Measure whether the maps of a finished run mean something, next to Grad-CAM, HiResCAM and baselines, and store the result.

    run: the folder of the run. masks: where the objects are: a folder of mask images with the names of the images, a JSON file of COCO, or
    a folder of XML files of Pascal VOC; by default the masks of the data itself, if it has some. metrics: names in
    `kdx.evaluate.registry.METRICS`; by default all for which the run has what they need. maps: names or symbols of maps; by default those
    of `kdx.evaluate.candidates.DEFAULT`, or ``["all"]``. layers: of the student; by default all of the run. images: how many, balanced over
    the classes, among those with a mask if there are masks; None for all. seed: of this choice and of what a metric draws. data, models:
    where the run's data and its models file are now; by default where they were. device: of the networks. max_minutes: without ``metrics``,
    metrics that run the networks again and do not fit into this time are left out, by an estimate from one batch (`kdx.evaluate.cost`), and
    no further map is measured when the time is over.

    The result is the mean over the images with its confidence interval (`kdx.runs.evaluation.mean_interval`) for each metric, map and
    layer, and the value of every image. It is written to evaluation.json and evaluation.parquet in the run's folder, where earlier results
    of other metrics stay. What is there already with the same images, masks and options is not computed again. Higher values of
    localisation mean that a map is on the marked object. They do not mean that the networks use it, nor that the teacher caused it.

    Raises KdxError for a run that is not finished; for a metric, map or layer that does not exist; for masks that cannot be read or belong
    to none of the images; and for a metric or a map that was named while the run's data or networks, which it needs, are not available.
    """
    record = read_run(as_path(run))
    are_named = bool(maps) and list(maps) != [ALL]
    plan = _Plan(chosen_metrics(METRICS, metrics), chosen(record, maps), _layers(record, layers), bool(metrics), are_named)
    _check_masks(plan, masks)
    if images is not None and images < 2:
        raise KdxError("An interval over images needs at least 2 images.", "Give a larger value of --images.")
    sources = Sources(data, None if models is None else Path(models), None if masks is None else Path(masks), device)
    with lock_folder(record.folder):
        subject = Subject(record, images, seed, sources, announce)
        work = _available(plan, subject, options, announce)
        state = _State(record, _known(record, work, subject, options))
        if not work.named_metrics:
            work = _affordable(state, subject, work, options, max_minutes, announce)
        with resumable(lambda: state.has_results), progress() as show:
            late = _measure(state, subject, work, options, show, math.inf if work.named_metrics else 60 * max_minutes)
        if late:
            announce(f"The time limit ({_minutes(60 * max_minutes)}) is reached, and metrics are incomplete. {_missing_hint(late)}")
        return state.evaluation


@dataclass(frozen=True)
class _Plan:
    """metrics, candidates and layers, and whether the first two were named."""

    metrics: list[Metric]
    candidates: list[Candidate]
    layers: list[str]
    named_metrics: bool
    named_candidates: bool

    def tasks(self, metric: Metric) -> Iterator[tuple[Candidate, str | None]]:
        """Every candidate and layer of a metric. A baseline has one task, without a layer."""
        for candidate in self.candidates:
            if metric.applies(candidate):
                for layer in self.layers if candidate.has_layer else [None]:
                    yield candidate, layer


@dataclass
class _State:
    """What is measured so far, in memory and on disk."""

    run: RunRecord
    evaluation: Evaluation
    unwritten: int = 0
    written: float = field(default_factory=time.monotonic)

    @property
    def has_results(self) -> bool:
        return bool(self.evaluation.measurements)

    @property
    def done(self) -> set[tuple[str, str, str | None]]:
        """What is measured: the metric, the candidate and the layer."""
        return {(measurement.metric, measurement.candidate, measurement.layer) for measurement in self.evaluation.measurements}

    def add(self, measurements: Sequence[Measurement], values: Mapping[str, Values]) -> None:
        known = self.evaluation
        self.evaluation = replace(known, measurements=(*known.measurements, *measurements), values={**known.values, **values})
        self.unwritten += len(measurements)
        if time.monotonic() - self.written > _SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        if self.unwritten:
            write_evaluation(self.run, self.evaluation)
            self.unwritten, self.written = 0, time.monotonic()


def _layers(run: RunRecord, names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in run.layers:
            raise KdxError(f"The run has no layer {name!r}.", f"Choose among: {', '.join(run.layers)}.")
    return list(dict.fromkeys(names)) or list(run.layers)


def _check_masks(plan: _Plan, masks: str | Path | None) -> None:
    """KdxError for masks that no metric looks at."""
    if masks is not None and not any("masks" in metric.needs for metric in plan.metrics):
        raise KdxError("None of the chosen metrics uses masks.", "Leave --masks out, or name another --metric.")


def _available(plan: _Plan, subject: Subject, options: EvaluationOptions, announce: Callable[[str], None]) -> _Plan:
    """The part of the plan for which the run has what it needs. KdxError for a missing part that the user named; others are announced."""
    needs: set[Need] = {need for metric in plan.metrics for need in metric.needs}
    if any(candidate.uses_networks for candidate in plan.candidates):
        needs |= {"images", "networks"}
    missing = {need: error for need in sorted(needs) if (error := _missing(need, subject, options)) is not None}
    if "networks" in missing:
        missing.pop("untrained", None)
    metrics = [metric for metric in plan.metrics if not missing.keys() & metric.needs]
    of_networks = missing.keys() & {"images", "networks"}
    candidates = [candidate for candidate in plan.candidates if not (candidate.uses_networks and of_networks)]
    for need, error in missing.items():
        without = [m.title for m in plan.metrics if need in m.needs]
        computed = [c.title for c in plan.candidates if c.uses_networks] if need in ("images", "networks") else []
        if (plan.named_metrics and without) or (plan.named_candidates and computed):
            raise error
        announce(f"Left out: {', '.join((*without, *computed))}. {error.problem} {error.hint}")
    if not metrics or not candidates:
        raise next(iter(missing.values()))
    return replace(plan, metrics=metrics, candidates=candidates)


def _missing(need: Need, subject: Subject, options: EvaluationOptions) -> KdxError | None:
    """Why the run does not have what a metric needs; None if it does."""
    if need == "masks":
        hint = "Give --masks: a folder of mask images, a JSON file of COCO, or a folder of XML files of Pascal VOC."
        return None if subject.masks is not None else KdxError("There are no masks.", hint)
    if need == "labels":
        if subject.run.target_file is not None:
            return KdxError(
                "kdx can compute maps again only for one-hot labels; the run has another target.", "Name other metrics with --metric."
            )
        if min(len(subject), options.detailed) < LEAST:
            return KdxError(f"Computing maps again needs at least {LEAST} images.", "Give larger values of --images and --detailed.")
        return None
    try:
        _ = subject.dataset if need == "images" else subject.networks if need == "networks" else subject.untrained("student")
    except KdxError as error:
        return error
    return None


def _basis(metric: Metric, subject: Subject, options: EvaluationOptions) -> dict[str, Any]:
    """What the results of a metric depend on, besides the run."""
    digest = hashlib.sha256("\n".join(subject.ids).encode("utf-8", "surrogatepass"))
    basis: dict[str, Any] = {"images": len(subject), "seed": subject.seed, "kdx": version("kdx")}
    if "masks" in metric.needs and subject.masks is not None:
        digest.update(np.packbits(subject.masks).tobytes())
        basis["area"] = float(subject.masks.mean())
    return {**basis, "sample": digest.hexdigest(), **{name: getattr(options, name) for name in metric.options}}


def _known(run: RunRecord, plan: _Plan, subject: Subject, options: EvaluationOptions) -> Evaluation:
    """The stored evaluation without what is to be computed anew, because other images, masks or options were given.

    That is deleted first, so that a process that is killed while it writes never leaves old means beside new values.
    """
    stored = read_evaluation(run) or Evaluation((), {}, {}, {}, run.confidence)
    planned = {metric.name: metric.record(_basis(metric, subject, options)) for metric in plan.metrics}
    same = {name for name, record in stored.metrics.items() if name not in planned or planned[name].basis == record.basis}
    kept = tuple(measurement for measurement in stored.measurements if measurement.metric in same)
    metrics = {**stored.metrics, **planned}
    known = Evaluation(
        kept,
        {name: metrics[name] for name in METRICS if name in metrics},
        {**stored.candidates, **{candidate.name: candidate.record for candidate in plan.candidates}},
        {measurement.number: stored.values[measurement.number] for measurement in kept},
        stored.confidence,
    )
    if len(kept) < len(stored.measurements):
        write_measurements(run, known)
    return known


def _affordable(
    state: _State, subject: Subject, plan: _Plan, options: EvaluationOptions, minutes: float, announce: Callable[[str], None]
) -> _Plan:
    """The plan without the metrics that do not fit into this many minutes together. It announces these, with the time of each."""
    done = state.done
    left = [(m, sum((m.name, c.name, layer) not in done for c, layer in plan.tasks(m))) for m in plan.metrics]
    if not any("networks" in metric.needs and maps for metric, maps in left):
        return plan
    metrics, left_out = affordable(Costs.of(subject, options), left, 60 * minutes)
    if left_out:
        times = ", ".join(f"{metric.title} (at least {_minutes(seconds)})" for metric, seconds in left_out.items())
        names = [metric.name for metric in left_out]
        announce(f"These metrics would take too long and are left out: {times}. {_missing_hint(names)}")
    return replace(plan, metrics=metrics)


def _missing_hint(metrics: Sequence[str]) -> str:
    options = " ".join(f"--metric {name}" for name in metrics)
    return f"To compute them, give {options} or a larger --max-minutes; a smaller --detailed makes them faster."


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _measure(state: _State, subject: Subject, plan: _Plan, options: EvaluationOptions, show: Show, limit: float) -> list[str]:
    """Compute the missing results, metric by metric, and store them. Returns the names of metrics that are incomplete after ``limit``
    seconds."""
    done, end = state.done, time.monotonic() + limit
    late = []
    for metric in plan.metrics:
        tasks = list(plan.tasks(metric))
        title = metric.title[0].upper() + metric.title[1:]
        try:
            for number, (candidate, layer) in enumerate(tasks):
                show(title, number, len(tasks), candidate.title)
                if (metric.name, candidate.name, layer) not in done:
                    if "networks" in metric.needs and time.monotonic() > end:
                        late.append(metric.name)
                        break
                    state.add(*_measured(metric, Task(subject, candidate, layer or plan.layers[0], options), layer, state))
            else:
                show(title, len(tasks), len(tasks), "maps")
        finally:
            state.write()  # also after Ctrl-C
    return late


def _measured(metric: Metric, task: Task, layer: str | None, state: _State) -> tuple[list[Measurement], dict[str, Values]]:
    """The measurements of one candidate at one layer, and their values for all images of the run."""
    measurements, columns = [], {}
    for part, values in metric.measure(task).items():
        value, interval = mean_interval(values[np.isfinite(values)], state.evaluation.confidence, hits=metric.hits)
        name = task.candidate.name
        n = int(np.isfinite(values).sum())
        measurements.append(Measurement(metric.name, name, layer, part, value, interval, n, empty_share(task.maps)))
        column = np.full(len(state.run.samples.ids), np.nan)
        column[task.subject.places] = values
        columns[number_name(layer, name, metric.name, part)] = column
    return measurements, columns
