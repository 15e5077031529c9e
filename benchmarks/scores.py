"""Scores of many images: against the bare Gram products of the same tiles, against dcor, and what permutations and batches add.

On random features of two models and ten classes; the score is RS(X|Y) with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdx
from benchmarks.subject import Run, Subject, Unavailable, Work, demand_agreement, demand_memory
from kdx.features.rows import rows_of
from kdx.kernels import tiles

CLASSES = 10
WITHIN = 1e-9
"""Of dcor's value, in float64."""


def draw(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = torch.randn(n, d, generator=generator).add_(x)
    return x, y, torch.randint(CLASSES, (n,), generator=generator)


def one_score(_: Path, *, n: int, d: int, without: tuple[str, ...] = ()) -> Subject:
    """The score against its tiles' Gram products, which nothing that measures distances can do without."""
    x, y, labels = draw(n, d)

    def bare(_: ExitStack) -> Run:
        side = tiles._side(n, [rows_of(x, "x"), rows_of(y, "y")])

        def run() -> None:
            for rows in (x, y):
                parts = rows.split(side)
                for a, left in enumerate(parts):
                    for right in parts[a:]:
                        left @ right.T

        return run

    ways = {
        "bare products": bare,
        "kdx": lambda _: lambda: kdx.rs(x, labels, y, permutations=0),
        "kdx, 999 permutations": lambda _: lambda: kdx.rs(x, labels, y),
    }
    # Both products' halves, and the rows read once.
    return Subject({name: way for name, way in ways.items() if name not in without}, work=lambda: Work(2.0 * n * n * d, 2 * 4.0 * n * d))


def permutations(_: Path, *, score: str, n: int, d: int) -> Subject:
    """What 999 permutations add to RS, which are of classes, and to FSS, which are of features."""
    x, y, labels = draw(n, d)
    run = {"RS": partial(kdx.rs, x, labels), "FSS": partial(kdx.fss, x, y)}[score]
    features = {"RS": 1, "FSS": 2}[score]
    return Subject(
        {score: lambda _: partial(run, permutations=0), f"{score}, 999 permutations": lambda _: run},
        # Half of a product for each network, and its rows read once.
        work=lambda: Work(features * 1.0 * n * n * d, features * 4.0 * n * d),
    )


def batches(_: Path, *, n: int, d: int, batch: int) -> Subject:
    """Three models' images in batches, every score with its permutations: one call, and the same batch by batch."""
    x, y, labels = draw(n, d)
    networks = {"student": x, "base": y, "teacher": x - y.roll(1, 1)}

    def batch_by_batch() -> None:
        for part in torch.arange(n // batch * batch).split(batch):
            kdx.compare({"layer": {role: rows[part] for role, rows in networks.items()}}, labels[part])

    return Subject(
        {"a call a batch": lambda _: batch_by_batch, "kdx": lambda _: lambda: kdx.compare({"layer": networks}, labels, batch=batch)},
        work=lambda: Work(len(networks) * 1.0 * n * batch * d, len(networks) * 4.0 * n * d),
    )


def beside_dcor(_: Path, *, n: int, d: int) -> Subject:
    """FSS by dcor, whose distances come from n x n x d differences, and by kdx."""
    x, y, _labels = (rows.double() for rows in draw(n, d))

    def by_dcor(_: ExitStack) -> Run:
        dcor = _dcor()
        demand_memory(1.1 * 8 * n * n * d, f"differences {n} x {n} x {d} in float64")
        return lambda: float(dcor.u_distance_correlation_sqr(x.numpy(), y.numpy()))

    ways = {"dcor": by_dcor, "kdx": lambda _: lambda: kdx.fss(x, y, permutations=0).value}
    return Subject(ways, _agree, lambda: Work(2.0 * n * n * d, 2 * 8.0 * n * d))


def estimators(_: Path, *, n: int, d: int) -> Subject:
    """Every estimator in float64 beside dcor's function for it; what is compared is the value."""
    x, y, labels = draw(n, d)
    x, y = x.double(), y.double()
    one_hot = torch.nn.functional.one_hot(labels).double()
    a, b, g = (rows.numpy() for rows in (x, y, one_hot))

    def by_dcor(_: ExitStack) -> Run:
        dcor = _dcor()
        return lambda: {
            "unbiased": float(dcor.u_distance_correlation_sqr(a, b)),
            "biased": float(dcor.distance_correlation_sqr(a, b)),
            "to classes": float(dcor.u_distance_correlation_sqr(a, g)),
            "partial": float(dcor.partial_distance_correlation(a, g, b)),
        }

    by_kdx: dict[str, Any] = {
        "unbiased": lambda: kdx.fss(x, y, permutations=0),
        "biased": lambda: kdx.fss(x, y, "biased", permutations=0),
        "to classes": lambda: kdx.rs(x, labels, permutations=0),
        "partial": lambda: kdx.partial_rs(x, labels, y, permutations=0),
    }
    return Subject(
        {
            "dcor": by_dcor,
            "kdx": lambda _: lambda: {name: score().value for name, score in by_kdx.items()},
        },
        _agree,
        lambda: Work(2.0 * n * n * d, 2 * 8.0 * n * d),
    )


def _agree(results: Mapping[str, Any]) -> dict[str, float]:
    if "dcor" not in results:
        return {}
    expected, found = results["dcor"], results["kdx"]
    if not isinstance(expected, dict):
        expected, found = {"value": expected}, {"value": found}
    figures = {f"{name}, off by": abs(found[name] - value) for name, value in expected.items()}
    demand_agreement(figures, WITHIN)
    return figures


def _dcor() -> Any:
    try:
        import dcor
    except ImportError as error:
        raise Unavailable("The package dcor is not installed.") from error
    return dcor
