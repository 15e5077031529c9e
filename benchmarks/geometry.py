"""The geometry alone: the channel weights and scores of both maps, from features that already exist.

kdx's time is that of `kdx.explain.layer.measure` without the shares of positions (`benchmarks.decomposition` times them). It computes more
than is compared: the maps, RS of each network, and every inner product without each image, for the intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.comparison import Comparison, Run, gram_work, require_agreement, require_difference_tensors
from kdx.explain.layer import LayerMethod, measure
from kdx.features.target import Target
from kdx.kernels import ambient
from kdx.scores import uncertainty

CLASSES = 4
TOLERANCE = 1e-3
"""Largest difference of a channel weight, divided by the largest weight, and of a score."""

WeightsAndScores = list[tuple[Tensor, float]]
"""Channel weights [n, C] and score of the distilled and of the residual map."""


def networks(n: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Related features [n, C, H, W] of a student and of a base, and labels [n]."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(n, channels, height, width, generator=generator).relu_()
    base = (0.5 * student).add_(torch.randn(student.shape, generator=generator).relu_())
    return student, base, torch.arange(n) % CLASSES


def comparison(_: Path, *, n: int, channels: int, height: int, width: int) -> Comparison:
    student, base, labels = networks(n, channels, height, width)
    one_hot = torch.nn.functional.one_hot(labels).float()
    d = channels * height * width

    def published(_: ExitStack) -> Run:
        require_difference_tensors(n, d)
        pairs = (student, base), (base, student)
        return lambda: [(weights, float(score)) for weights, score in (eager.published_geometry(x, y, one_hot) for x, y in pairs)]

    def fair(_: ExitStack) -> Run:
        def run() -> WeightsAndScores:
            weights, (_fss, *scores) = eager.fair_geometry(student, base, one_hot)
            return [(map_weights, float(score)) for map_weights, score in zip(weights, scores, strict=True)]

        return run

    def kdx(_: ExitStack) -> Run:
        table = uncertainty.permutation_table(n, 0, 0)
        target = Target.of(labels)

        @ambient.neutral()  # as every public function that calls `measure`
        def run() -> WeightsAndScores:
            maps = measure({"student": student, "base": base}, target, table, LayerMethod(shares=False)).maps
            return [(maps[name].weights, maps[name].score) for name in ("distilled", "residual")]

        return run

    return Comparison({"published": published, "fair": fair, "kdx": kdx}, _check, lambda: gram_work(n, d))


def _check(results: Mapping[str, Any]) -> dict[str, float]:
    """The differences of each variant's weights and scores from kdx's."""
    expected: WeightsAndScores = results["kdx"]
    figures: dict[str, float] = {}
    for name, result in results.items():
        if name != "kdx":
            for which, (weights, score), (kdx_weights, kdx_score) in zip(("distilled", "residual"), result, expected, strict=True):
                figures[f"{which} weights of {name}"] = float((weights - kdx_weights).abs().max() / kdx_weights.abs().max())
                figures[f"{which} score of {name}"] = abs(score - kdx_score)
    require_agreement(figures, TOLERANCE)
    return figures
