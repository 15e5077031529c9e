"""Scores of many images, compared with the Gram products of the same tiles and with dcor; the cost of permutations and of batches.

The features of two models are random, and there are ten classes. The score is RS(X|Y) with its interval.
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
from benchmarks.comparison import Comparison, Run, Unavailable, gram_work, require_agreement, require_difference_tensors
from kdx.features.rows import rows_of
from kdx.kernels import tiles

CLASSES = 10
TOLERANCE = 1e-9
"""Largest difference from dcor's value, in float64."""


def draw(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features x and y [n, d], where y contains x, and labels [n]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = torch.randn(n, d, generator=generator).add_(x)
    return x, y, torch.randint(CLASSES, (n,), generator=generator)


def one_score(_: Path, *, n: int, d: int, without: tuple[str, ...] = ()) -> Comparison:
    """The score compared with its tiles' Gram products, without which no distance can be computed. without: variants to leave out."""
    x, y, labels = draw(n, d)

    def bare_products(_: ExitStack) -> Run:
        side = tiles.tile_side(n, [rows_of(x, "x"), rows_of(y, "y")])

        def run() -> None:
            for rows in (x, y):
                parts = rows.split(side)
                for a, left in enumerate(parts):
                    for right in parts[a:]:
                        left @ right.T

        return run

    variants = {
        "bare products": bare_products,
        "kdx": lambda _: lambda: kdx.rs(x, labels, y, permutations=0),
        "kdx, 999 permutations": lambda _: lambda: kdx.rs(x, labels, y),
    }
    return Comparison({name: variant for name, variant in variants.items() if name not in without}, work=lambda: gram_work(n, d))


def permutations(_: Path, *, score: str, n: int, d: int) -> Comparison:
    """The cost of 999 permutations of RS, which permute classes, and of FSS, which permute features."""
    x, y, labels = draw(n, d)
    run = {"RS": partial(kdx.rs, x, labels), "FSS": partial(kdx.fss, x, y)}[score]
    matrices = {"RS": 1, "FSS": 2}[score]
    return Comparison(
        {score: lambda _: partial(run, permutations=0), f"{score}, 999 permutations": lambda _: run},
        work=lambda: gram_work(n, d, matrices=matrices),
    )


def batches(_: Path, *, n: int, d: int, batch: int) -> Comparison:
    """Every score of three models in batches, with its permutations: one call for all batches, and one call per batch."""
    x, y, labels = draw(n, d)
    networks = {"student": x, "base": y, "teacher": x - y.roll(1, 1)}

    def batch_by_batch() -> None:
        for part in torch.arange(n // batch * batch).split(batch):
            kdx.compare({"layer": {role: rows[part] for role, rows in networks.items()}}, labels[part])

    return Comparison(
        {"one call per batch": lambda _: batch_by_batch, "kdx": lambda _: lambda: kdx.compare({"layer": networks}, labels, batch=batch)},
        work=lambda: gram_work(n, d, matrices=len(networks), batch=batch),
    )


def beside_dcor(_: Path, *, n: int, d: int) -> Comparison:
    """FSS by dcor, which computes distances from n x n x d differences, and by kdx."""
    x, y, _labels = (rows.double() for rows in draw(n, d))

    def by_dcor(_: ExitStack) -> Run:
        dcor = _dcor()
        require_difference_tensors(n, d, tensors=1.1, itemsize=8)
        return lambda: float(dcor.u_distance_correlation_sqr(x.numpy(), y.numpy()))

    variants = {"dcor": by_dcor, "kdx": lambda _: lambda: kdx.fss(x, y, permutations=0).value}
    return Comparison(variants, _check, lambda: gram_work(n, d, itemsize=8))


def estimators(_: Path, *, n: int, d: int) -> Comparison:
    """Each estimator in float64 compared with dcor's function for it. Only the values are compared."""
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
    variants = {"dcor": by_dcor, "kdx": lambda _: lambda: {name: score().value for name, score in by_kdx.items()}}
    return Comparison(variants, _check, lambda: gram_work(n, d, itemsize=8))


def _check(results: Mapping[str, Any]) -> dict[str, float]:
    """The differences of kdx's values from dcor's, if dcor ran."""
    if "dcor" not in results:
        return {}
    expected, actual = results["dcor"], results["kdx"]
    if not isinstance(expected, dict):
        expected, actual = {"value": expected}, {"value": actual}
    figures = {f"{name}, off by": abs(actual[name] - value) for name, value in expected.items()}
    require_agreement(figures, TOLERANCE)
    return figures


def _dcor() -> Any:
    try:
        import dcor
    except ImportError as error:
        raise Unavailable("The package dcor is not installed.") from error
    return dcor
