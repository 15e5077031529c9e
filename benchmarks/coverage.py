"""The share of confidence intervals that contain the true score, over simulated sets of images.

    python -m benchmarks.coverage [--scale 1] [--workers 1]     about fifteen minutes of one core; writes benchmarks/results/coverage.json
    python -m docs.draw_coverage                                draws the picture of docs/mathematics.md from that file

Each population has normal features of a teacher, a student and a base in 16 dimensions, and labels. ``relation`` moves the images of a
class together and gives the three networks a common part; at 0 the networks and the labels are independent, and each score is 0.
``decay`` scales dimension i by i^-decay: with 1, two directions dominate. Otherwise the true scores are those of a very large sample. Every
cell has the coverage of one score at three levels, by kdx and by two other methods: the jackknife alone, and percentiles of a bootstrap.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import store
from kdx.features.rows import feature_distances, rows_of
from kdx.features.target import Target
from kdx.kernels import geometry, moments, tiles
from kdx.kernels.moments import Moments
from kdx.roles import CONTRASTS, ROLES, SCORES, TARGET, contrast_name
from kdx.scores.score import STATISTICS, Estimate, estimate
from kdx.scores.uncertainty import MANY_BATCHES, Spread, interval, pooled_moments, spread

LEVELS = (0.8, 0.95, 0.99)
DIMENSIONS = 16
TRUE_SET = 100
NAMES = ("FSS(S,T)", "FSS(B,T)", "RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)")

_CONTRASTS = [pair for pair in CONTRASTS if set(pair) <= set(NAMES)]


@dataclass(frozen=True)
class Population:
    """Where images are drawn from. true_sets: the number of sets of TRUE_SET images that give the true scores."""

    name: str
    classes: int
    relation: float
    balanced: bool = True
    decay: float = 0.0
    true_sets: int = 1000

    def draw(self, rng: np.random.Generator, n: int) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
        """The features [n, d] of each role, and the labels [n]."""
        shares = np.ones(self.classes) if self.balanced else np.arange(1, self.classes + 1) ** -1.5
        labels = rng.choice(self.classes, size=n, p=shares / shares.sum())
        centres = self.relation * np.random.default_rng(7).normal(size=(self.classes, DIMENSIONS))[labels]
        common = rng.normal(size=(n, DIMENSIONS)) if self.relation else np.zeros((n, DIMENSIONS))
        widths = np.arange(1, DIMENSIONS + 1) ** -self.decay
        parts = {"teacher": (1.0, 1.0), "student": (0.7, 0.7), "base": (0.4, 0.5)}
        return {
            role: (own * centres + shared * common + rng.normal(size=(n, DIMENSIONS))) * widths for role, (own, shared) in parts.items()
        }, labels

    def matrices(self, rng: np.random.Generator, n: int) -> Tensor:
        """The U-centred matrices [4, n, n] of n images, in the order of ROLES and the target."""
        return geometry.u_centered(self.distances(rng, n))

    def distances(self, rng: np.random.Generator, n: int) -> Tensor:
        """The distances [4, n, n] of n images, in the order of ROLES and the target."""
        features, labels = self.draw(rng, n)
        rows = [*(features[role] for role in ROLES), np.eye(self.classes)[labels]]
        return torch.stack([geometry.distances(torch.from_numpy(each)) for each in rows])

    def true_scores(self) -> dict[str, float]:
        names = [*NAMES, *(contrast_name(*pair) for pair in _CONTRASTS)]
        if not self.relation:
            return dict.fromkeys(names, 0.0)
        rng = np.random.default_rng(99)
        products = torch.stack([geometry.products(self.matrices(rng, TRUE_SET)) for _ in range(self.true_sets)]).sum(0)
        return {name: value.value for name, value in estimates(products).items()}


POPULATIONS = (
    Population("unrelated, 2 classes", 2, 0.0),
    Population("unrelated, 10 classes", 10, 0.0),
    Population("unrelated, 100 classes", 100, 0.0),
    Population("weakly related, 2 classes", 2, 0.25),
    Population("related, 2 classes", 2, 0.5),
    Population("related, 10 classes", 10, 0.5, true_sets=4000),
    Population("related, 100 classes", 100, 0.5),
    Population("related, 10 unbalanced classes", 10, 0.7, balanced=False),
    Population("related, two directions, 2 classes", 2, 0.5, decay=1.0),
    Population("unrelated, two directions, 2 classes", 2, 0.0, decay=1.0),
)
"""The last two are outside the goal: two classes, and features that vary in little more than one direction."""

BOTH = ("unrelated, 2 classes", "related, 10 classes")

Case = tuple[str, int, int, int, dict[str, float]]
"""A population's name, the number of images, the number of batches, the number of draws, and the true scores."""


def cases(scale: float, truths: Mapping[str, dict[str, float]]) -> list[Case]:
    sizes = {16: 300, 32: 300, 64: 600, 128: 250, 256: 150}
    every = [(p.name, n, 1, draws) for n, draws in sizes.items() for p in POPULATIONS]
    large = [(name, 1000, 1, 150) for name in BOTH]
    batched = [(name, n, b, 200) for name in BOTH for n, b in ((108, 2), (160, 10), (320, 20), (800, 50), (3200, 200))]
    huge = [("related, 10 classes", 10_000, 1, 10), ("related, 10 classes", 10_000, 40, 100)]
    return [(name, n, batches, max(4, round(scale * draws)), truths[name]) for name, n, batches, draws in (*huge, *large, *batched, *every)]


def estimates(products: Tensor) -> dict[str, Estimate]:
    """Every score and contrast from inner products [4, 4]."""
    place = {name: i for i, name in enumerate((*ROLES, TARGET))}
    result = {}
    for name in NAMES:
        index = torch.tensor([place[matrix] for matrix in SCORES[name].matrices])
        statistic = STATISTICS[SCORES[name].statistic]
        result[name] = estimate(lambda p, s=statistic, at=index: s(p[..., at[:, None], at]), products)  # type: ignore[misc]
    return result | {contrast_name(more, less): result[more] - result[less] for more, less in _CONTRASTS}


def sampled(population: Population, rng: np.random.Generator, n: int, batches: int) -> tuple[Tensor, Moments | None]:
    """The inner products of one draw and their moments, as kdx computes them."""
    if batches == 1 and n > moments.SINGLE_IMAGES:
        features, labels = population.draw(rng, n)
        target = Target.of(torch.from_numpy(labels)).matrix()
        swept = tiles.Sweep([*(feature_distances(rows_of(features[role], role), role) for role in ROLES), target]).run()
        return swept.products, swept.moments
    drawn = [population.matrices(rng, n // batches) for _ in range(batches)]
    products = torch.stack([geometry.products(each) for each in drawn])
    within = [moments.of_matrices(each) if batches < MANY_BATCHES else None for each in drawn]
    return products.sum(0), within[0] if batches == 1 else pooled_moments(products, within)


def bootstrapped(d: Tensor, rng: np.random.Generator, draws: int) -> dict[str, NDArray[np.float64]]:
    """Every score of ``draws`` samples of the images with replacement, from distances [4, n, n]."""
    values: dict[str, list[float]] = {}
    for _ in range(draws):
        index = torch.from_numpy(rng.integers(d.shape[1], size=d.shape[1]))
        for name, value in estimates(geometry.products(geometry.u_centered(d[:, index][:, :, index]))).items():
            values.setdefault(name, []).append(value.value)
    return {name: np.array(each) for name, each in values.items()}


def ends_of(name: str, value: Estimate, known: Moments | None, level: float, n: int) -> dict[str, tuple[float, float]]:
    """The interval of kdx, and that of the jackknife alone: without the correction and without the slope."""
    limit, own = (1.0, spread(known, value.gradient)) if name in NAMES else (2.0, spread(known, value.gradient))
    if own is not None and limit == 2:
        own = own._replace(slope=0.0)
    first = None if known is None else Spread(float(value.gradient @ known.variance.numpy() @ value.gradient), 0.0, known.parts)
    return {
        "kdx": interval(value.value, own, level, n=n, limit=limit),
        "jackknife": interval(value.value, first, level, n=n, limit=limit),
    }


def measured(case: Case) -> list[dict[str, Any]]:
    """The coverage of every score in one case, at each of LEVELS."""
    torch.set_num_threads(1)
    name, n, batches, draws, truth = case
    population = next(p for p in POPULATIONS if p.name == name)
    rng = np.random.default_rng([n, batches])
    hits: dict[tuple[str, str], list[list[bool]]] = {}
    widths: dict[str, list[float]] = {}
    for _ in range(draws):
        products, known = sampled(population, rng, n, batches)
        if not products[-1, -1] > 1e-9:
            continue  # no two images share a class: kdx refuses such labels
        for score, value in estimates(products).items():
            ends = [ends_of(score, value, known, level, n) for level in LEVELS]
            for method in ends[0]:
                hits.setdefault((score, method), []).append([low <= truth[score] <= high for low, high in (e[method] for e in ends)])
            low, high = ends[1]["kdx"]
            widths.setdefault(score, []).append(high - low)
    return [
        {
            "population": name,
            "n": n,
            "batches": batches,
            "score": score,
            "method": method,
            "draws": len(rows),
            "truth": truth[score],
            "coverage": [float(x) for x in np.mean(rows, axis=0)],
            "width": float(np.mean(widths[score])) if method == "kdx" else None,
        }
        for (score, method), rows in hits.items()
    ]


def bootstrap_cells(draws: int, truths: Mapping[str, dict[str, float]], resamples: int = 100, n: int = 64) -> Iterator[dict[str, Any]]:
    """The coverage of percentiles of a bootstrap over images, for two populations."""
    for population in (p for p in POPULATIONS if p.name in BOTH):
        truth, rng = truths[population.name], np.random.default_rng(0)
        hits: dict[str, list[list[bool]]] = {}
        for _ in range(draws):
            for score, values in bootstrapped(population.distances(rng, n), rng, resamples).items():
                ends = [np.quantile(values, (0.5 - level / 2, 0.5 + level / 2)) for level in LEVELS]
                hits.setdefault(score, []).append([bool(low <= truth[score] <= high) for low, high in ends])
        for score, rows in hits.items():
            cell = {"population": population.name, "n": n, "batches": 1, "score": score, "method": "bootstrap", "draws": draws}
            yield {**cell, "truth": truth[score], "coverage": [float(x) for x in np.mean(rows, axis=0)], "width": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of draws")
    parser.add_argument("--workers", type=int, default=1, help="processes, each on one core")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    cells: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        truths = dict(zip((p.name for p in POPULATIONS), pool.map(Population.true_scores, POPULATIONS, 1), strict=True))
        for done, part in enumerate(pool.imap(measured, cases(options.scale, truths)), 1):
            cells += part
            worst = max((abs(c["coverage"][1] - 0.95) for c in part if c["method"] == "kdx"), default=0.0)
            print(
                f"{done:3} {part[0]['population']}, n = {part[0]['n']}, {part[0]['batches']} batches: off by {worst:.3f} at 95%", flush=True
            )
    cells += bootstrap_cells(max(4, round(40 * options.scale)), truths)
    store(
        "coverage",
        "benchmarks.coverage",
        {"levels": LEVELS, "seconds": time.perf_counter() - start, "populations": [asdict(p) for p in POPULATIONS], "cells": cells},
    )


if __name__ == "__main__":
    main()
