"""The geometry alone: both maps' channel weights and scores, from features that are there already.

kdx's time is of `kdx.transfer.measure`, which makes more than is compared: the maps, RS of each network, and every inner product
without each image, for the intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.subject import Run, Subject, Way, Work, demand_agreement, demand_differences
from kdx.explain.layer import measure
from kdx.features.target import Target
from kdx.scores import uncertainty

CLASSES = 4
WITHIN = 1e-3
"""Largest difference of a channel weight, as a share of the largest weight, and of a score."""

Both = list[tuple[Tensor, float]]
"""Channel weights [n, C] and score of the distilled and of the residual map."""


def subject(_: Path, *, n: int, channels: int, height: int, width: int) -> Subject:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(n, channels, height, width, generator=generator).relu_()
    base = (0.5 * student).add_(torch.randn(student.shape, generator=generator).relu_())
    labels = torch.arange(n) % CLASSES
    one_hot = torch.nn.functional.one_hot(labels).float()
    d = channels * height * width

    def published(_: ExitStack) -> Run:
        demand_differences(n, d)
        given = (student, base), (base, student)
        return lambda: [(weights, float(score)) for weights, score in (eager.published_geometry(x, y, one_hot) for x, y in given)]

    def fair(_: ExitStack) -> Run:
        def run() -> Both:
            weights, (_likeness, *found) = eager.fair_geometry(student, base, one_hot)
            return [(each, float(score)) for each, score in zip(weights, found, strict=True)]

        return run

    def kdx(_: ExitStack) -> Run:
        table = uncertainty.permutation_table(n, 0, 0)
        target = Target.of(labels)

        def run() -> Both:
            found = measure({"student": student, "base": base}, target, permutations=table).maps
            return [(found[name].weights, found[name].score) for name in ("distilled", "residual")]

        return run

    ways: dict[str, Way] = {"published": published, "fair": fair, "kdx": kdx}
    # Two Gram products, of whose symmetric halves one is enough, and the features read once.
    return Subject(ways, _alike, lambda: Work(2.0 * n * n * d, 2 * 4.0 * n * d))


def _alike(results: Mapping[str, Any]) -> dict[str, float]:
    known: Both = results["kdx"]
    figures: dict[str, float] = {}
    for name, found in results.items():
        if name != "kdx":
            for which, (a, score), (b, expected) in zip(("distilled", "residual"), found, known, strict=True):
                figures[f"{which} weights of {name}"] = float((a - b).abs().max() / b.abs().max())
                figures[f"{which} score of {name}"] = abs(score - expected)
    demand_agreement(figures, WITHIN)
    return figures
