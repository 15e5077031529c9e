"""`kdx plan`: the estimated cost of `kdx explain` with the same options, from a short timed trial or from the data sheets of GPUs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from kdx import threads
from kdx.disk import scratch_folder
from kdx.errors import KdxError
from kdx.runs.cost import Cost, Pass, Work
from kdx.runs.environment import peak_bytes
from kdx.runs.feature_files import Shapes
from kdx.runs.geometry import Geometry, geometry_within, products_per_second, requested_geometry, size_text
from kdx.runs.hardware import ARITHMETIC, Cluster, cluster_seconds
from kdx.runs.plan import Plan, RunOptions, aligned
from kdx.runs.trial import Clock, counted_pass, decoding_trial, opened, timed_trial
from kdx.runs.whole import feature_shapes
from kdx.runtimes.choice import is_file


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run. It contains no measurement of that run.

    machine: its description. own_images: the number of images in the data. work: the work of the run. stages: operations and bytes.
    seconds: of each stage. shared: whether decoding and passes share the processor, so that their times add up; otherwise the longer of the
    two counts.
    process: the bytes of memory that do not depend on the number of images.
    """

    machine: str
    own_images: int
    work: Work
    geometry: Geometry
    stages: Mapping[str, Cost]
    seconds: Mapping[str, float]
    shared: bool
    process: int

    @property
    def total(self) -> float:
        """The seconds of the run."""
        by_batch = [self.seconds[name] for name in ("passes", "maps and scores") if name in self.seconds]
        rest = sum(self.seconds.values()) - sum(by_batch) - self.seconds["decoding"]
        first = (self.seconds["decoding"], sum(by_batch))
        return rest + (sum(first) if self.shared else max(first))

    @property
    def memory(self) -> float:
        """The peak of the memory of the process."""
        return self.process + self.work.growing_memory(self.geometry.kind)

    def as_json(self) -> dict[str, Any]:
        """All figures: seconds, bytes, operations."""
        return {
            "machine": self.machine,
            "images": self.work.images,
            "images_of_the_data": self.own_images,
            "layers": {layer: {role: self.work.shapes[role][layer] for role in self.work.roles} for layer in self.work.layers},
            "geometry": self.geometry.kind,
            "geometry_reason": self.geometry.reason,
            "operations_of_a_pass": None if self.work.one_pass is None else self.work.one_pass.operations,
            "stages": {
                name: {"seconds": seconds, **({} if name not in self.stages else vars(self.stages[name]))}
                for name, seconds in self.seconds.items()
            },
            "seconds": self.total,
            "disk_bytes": self.work.disk(self.geometry.kind),
            "memory_bytes": self.memory,
        }


def run(
    data: str,
    models: Path,
    layers: Sequence[str] = (),
    options: RunOptions = RunOptions(),
    *,
    out: Path | None = None,
    images: int | None = None,
    cluster: Cluster | None = None,
    announce: Callable[[str], None] = print,
    clock: Clock = time.perf_counter,
) -> Estimate:
    """Estimate the cost of explaining ``images`` images like those of ``data``, by default as many as it has.

    out: the folder of the run, or its URL, whose disk must have room; by default the current folder. cluster: the machines; None for this
    machine, whose speed a trial measures with ``clock``. Nothing is written to ``out``, and exported networks are deleted.

    Raises the errors of `kdx.runs.run.explain_dataset`, and KdxError for an explainer file and for exported networks on other machines.
    """
    if is_file(models):
        raise KdxError("kdx plan does not accept explainer files.", "Give the models file that names the networks.")
    plan = Plan.of(data, models, layers, options)
    files = any(map(is_file, plan.models.references.values()))
    if cluster is not None and files:
        raise KdxError(
            "The operations of exported networks cannot be counted.", "Name the networks by model references, or leave --on out."
        )
    if cluster is not None and options.features == "salient":
        raise KdxError("The operations of salient features cannot be counted.", "Choose raw features (--features raw), or leave --on out.")
    known, n = requested_geometry(plan), images or len(plan.indices)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes, size, one_pass = _networks(plan, folder, announce, counted=not files)
        work = Work(
            n,
            shapes,
            options.batch,
            options.permutations,
            one_pass,
            options.stored_precision,
            options.pooled,
            _machine_memory() if cluster is None else cluster.memory * cluster.machines,
        )
        if cluster is not None:
            return _on_cluster(plan, work, known, size, cluster)
        scratch = scratch_folder(out or Path())  # of a run at a URL, features are on this machine
        place = next(path for path in (scratch, *scratch.absolute().parents) if path.exists())
        geometry = known or geometry_within(plan, shapes, n, shutil.disk_usage(place).free, place, products_per_second)
        with plan.explainer(folder, lambda line: None) as explainer:
            explainer.open(size, n, batch=aligned(plan.options.batch))
            announce(f"Runtime {explainer.choice.why}.")
            speed = timed_trial(plan, explainer, size, work, geometry.kind, announce, clock)
            device = explainer.choice.device
    cores = threads.available_cores()
    machine = f"this machine, {cores} core{'s' if cores != 1 else ''}" + ("" if device.type == "cpu" else f" and {device}")
    seconds = speed.seconds(work, geometry.kind)
    return Estimate(machine, len(plan.indices), work, geometry, work.stages(geometry.kind), seconds, not speed.on_gpu, peak_bytes())


def _networks(plan: Plan, folder: Path, announce: Callable[[str], None], *, counted: bool) -> tuple[Shapes, tuple[int, int], Pass | None]:
    """The shapes of the features, the size of the images, and the operations of a pass, from a pass in PyTorch where that is possible."""
    if counted:
        plan = replace(plan, options=replace(plan.options, runtime="eager", device="cpu", precision="float32"))
    with opened(plan, folder, announce) as (explainer, size):
        shapes = feature_shapes(explainer, size, plan.options.project)
        return shapes, size, counted_pass(explainer, size) if counted else None


def _on_cluster(plan: Plan, work: Work, known: Geometry | None, size: tuple[int, int], cluster: Cluster) -> Estimate:
    """The estimate from data sheets. Only the decoding of a few images is timed, on one core of this machine."""
    rate = ARITHMETIC * cluster.gpu.float32 * cluster.count
    geometry = known or geometry_within(plan, work.shapes, work.images, float("inf"), cluster.name, lambda: rate)
    stages = work.stages(geometry.kind)
    plan = replace(plan, options=replace(plan.options, workers=1))
    _, core_seconds = decoding_trial(plan, size)
    seconds = cluster_seconds(cluster, stages, work.images, core_seconds, plan.options.precision)
    return Estimate(cluster.name, len(plan.indices), work, geometry, stages, seconds, False, peak_bytes())


def _machine_memory() -> float:
    """The bytes of memory of this machine; infinite where the system does not state them."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


# ---- the table ----

_NAMES = {
    "decoding": "decoding of the images",
    "passes": "passes of the networks",
    "maps and scores": "maps and scores of the batches",
    "features": "features, written",
    "sweeps": "sweeps over all pairs of images",
    "results": "results, written",
}


_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def tables(estimate: Estimate) -> list[Table | str]:
    """The estimate as tables and lines for a terminal."""
    work, geometry = estimate.work, estimate.geometry
    count = f"{work.images:,} images" + ("" if work.images == estimate.own_images else f" like the {estimate.own_images:,} of the data")
    layers = ", ".join(work.layers)
    passes = "" if work.one_pass is None else f"; {_amount(work.one_pass.operations)} operations per image"
    lines: list[Table | str] = [
        f"Estimate for {count}, on {estimate.machine}. Only the run itself can measure its cost.",
        f"Networks: {', '.join(work.roles)}; layers: {layers}{passes}.",
        f"Geometry {geometry.kind}: {geometry.reason}.",
    ]
    stages = Table("stage", "time", "operations", "bytes in memory", "bytes on disk", box=None)
    for name, seconds in estimate.seconds.items():
        cost = estimate.stages.get(name, Cost())
        stages.add_row(_NAMES[name], time_text(seconds), *map(_amount, (cost.operations, cost.memory, cost.disk)))
    together = "" if estimate.shared else ", with decoding during the passes"
    sizes = Table("space", "size", box=None)
    for name, size in work.disk(geometry.kind).items():
        note = " (deleted at the end)" if name == "scratch" or (name == "features" and size) else " (at most)" if name == "maps" else ""
        sizes.add_row(f"{name} on disk{note}", size_text(size))
    sizes.add_row("memory of the process", size_text(estimate.memory))
    return [*lines, "", stages, "", f"In all: about {time_text(estimate.total)}{together}.", "", sizes]


def time_text(seconds: float) -> str:
    """A time in words, with two digits or three."""
    for unit, size in (("days", 172_800.0), ("hours", 7_200.0), ("minutes", 120.0)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'hours': 3_600, 'minutes': 60}[unit]:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:,.0f} ms"


def _amount(value: float) -> str:
    if not value:
        return "–"
    power, prefix = next(((power, prefix) for power, prefix in _PREFIXES if value >= power), (1.0, ""))
    return f"{value / power:.3g} {prefix}".rstrip()
