"""The cost of metrics that run the networks again, estimated from one batch, and the metrics that fit into a time limit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdx.evaluate.metrics import EvaluationOptions, Metric
from kdx.evaluate.perturbed_metrics import SHARES
from kdx.evaluate.randomisation import network_parts
from kdx.evaluate.recomputation import detailed_rows
from kdx.evaluate.subject import PART, Subject
from kdx.export.graphs import FeatureGraph
from kdx.runtimes.eager import EagerRunner

DEFAULT_MINUTES = 10.0
"""The default limit of the metrics' time, in minutes. It does not apply to metrics that the user names."""

_WORK = {
    "insertion": ("insertion",),
    "deletion": ("deletion",),
    "road_keep": ("keep",),
    "road_remove": ("remove",),
    "road": ("keep", "remove"),
    "randomisation": ("randomisation",),
    "randomisation_ssim": ("randomisation",),
    "label_randomisation": ("labels",),
    "batches": ("batches",),
    "references": ("references",),
    "sensitivity": ("sensitivity",),
}
"""The parts of the work of each metric that runs the networks again. Metrics with a part in common compute it once."""

_BACKWARD = 3
"""A class map takes about as long as this many forward passes: one forward, and a backward pass that takes twice as long."""


@dataclass(frozen=True)
class Costs:
    """The seconds of forward passes alone. Imputation, geometry and rankings are not included, so the work takes longer.

    per_map: the seconds of one map at one layer, by part of the work. once: those of parts that all maps share.
    """

    per_map: Mapping[str, float]
    once: Mapping[str, float]

    @classmethod
    def of(cls, subject: Subject, options: EvaluationOptions) -> Costs:
        """Times a batch of each network of the run."""
        rows = detailed_rows(subject, options)
        seconds = {role: len(rows) * _seconds_per_image(subject, role) for role in subject.run.roles}
        scored = sum(seconds[role] for role in seconds if role != "teacher")
        maps = sum(seconds.values()) + _BACKWARD * scored
        randomised = 1 + len(network_parts(subject.networks["student"].module))
        curve, road = (options.steps + 1) * scored, len(SHARES) * scored
        return cls(
            {"insertion": curve, "deletion": curve, "keep": road, "remove": road},
            {"randomisation": randomised * maps, "labels": 6 * maps, "batches": 2 * maps, "references": 2 * maps, "sensitivity": 11 * maps},
        )

    def seconds(self, metric: Metric, maps: int, done: set[str]) -> float:
        """The seconds of a metric of this many maps, without the parts that are ``done``."""
        parts = [part for part in _WORK.get(metric.name, ()) if part not in done]
        return sum(self.once[part] if part in self.once else maps * self.per_map[part] for part in parts) if maps else 0.0


def affordable(costs: Costs, metrics: Sequence[tuple[Metric, int]], limit: float) -> tuple[list[Metric], dict[Metric, float]]:
    """The metrics that fit into ``limit`` seconds together, in their order, and the seconds of each of the others.

    metrics: each with the number of its maps that are not measured yet.
    """
    chosen: list[Metric] = []
    left_out: dict[Metric, float] = {}
    done: set[str] = set()
    total = 0.0
    for metric, maps in metrics:
        seconds = costs.seconds(metric, maps, done)
        if total + seconds > limit and seconds > 0:
            left_out[metric] = seconds
            continue
        total += seconds
        done.update(_WORK.get(metric.name, ()))
        chosen.append(metric)
    return chosen, left_out


def _seconds_per_image(subject: Subject, role: str) -> float:
    """The seconds per image of a forward pass of a batch, the second of two passes."""
    network = subject.networks[role]
    pixels = subject.pixels(slice(0, min(PART, len(subject))))
    with EagerRunner(FeatureGraph(network.module, [], network.preprocessing), subject.device) as runner:
        for _ in range(2):
            start = time.perf_counter()
            float(runner.infer(pixels).logits.sum())
            seconds = time.perf_counter() - start
    return seconds / len(pixels)
