"""The geometry alone: both maps' channel weights and scores, from features that are there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.subject import Run, Subject, Way, Work, demand_memory
from kdx import scores, transfer
from kdx.transfer import Target

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

    def by_autograd(geometry: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], tensors: int) -> Way:
        def opened(_: ExitStack) -> Run:
            if tensors:
                demand_memory(tensors * 4.0 * n * n * d, f"{tensors} tensors of {n} x {n} x {d:,} differences")
            given = (student, base), (base, student)
            return lambda: [(weights, float(score)) for weights, score in (geometry(x, y, one_hot) for x, y in given)]

        return opened

    def kdx(_: ExitStack) -> Run:
        table = scores.permutation_table(n, 0, 0)
        target = Target.of(labels)

        def run() -> Both:
            found = transfer.measure({"student": student, "base": base}, target, permutations=table).maps
            return [(found[name].weights, found[name].score) for name in ("distilled", "residual")]

        return run

    ways: dict[str, Way] = {"published": by_autograd(eager.published_geometry, 5), "fair": by_autograd(eager.fair_geometry, 0), "kdx": kdx}
    # Two Gram products, of whose symmetric halves one is enough, and the features read once.
    return Subject(ways, _alike, Work(2.0 * n * n * d, 2 * 4.0 * n * d))


def _alike(results: Mapping[str, Any]) -> dict[str, float]:
    known: Both = results["kdx"]
    figures: dict[str, float] = {}
    for name, found in results.items():
        pairs = list(zip(found, known, strict=True))
        weights = max(float((a - b).abs().max() / b.abs().max()) for (a, _), (b, _) in pairs)
        values = max(abs(a - b) for (_, a), (_, b) in pairs)
        if name != "kdx":
            figures |= {f"weights of {name}": weights, f"scores of {name}": values}
        if not max(weights, values) < WITHIN:
            raise SystemExit(f"{name} is not what kdx gives: weights differ by {weights:.1e}, scores by {values:.1e}")
    return figures
