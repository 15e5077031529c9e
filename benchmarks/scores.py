"""Scores of many images: against the bare Gram products of the same tiles, against dcor, and what permutations and batches add.

Each case runs in a process of its own, on random features and ten classes; the score is RS(X|Y) with its interval. First of all, every
estimator is compared with dcor at N = 1,000.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

import kdx
from benchmarks import readme
from benchmarks.record import child, paired, peak_bytes, quartiles, ratio, store
from kdx.kernels import sweep
from kdx.rows import rows_of

CLASSES = 10
LARGE, HUGE, MANY = (10_000, 2048), (50_000, 512), (2_000, 2048)
"""(N, d) of the case against Gram products, of the largest, and of the permutations'."""

DCOR_WIDTH = 64
"""d beside dcor, whose limit is N x N: its distances of wider rows take hours, not more memory."""


def draw(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = torch.randn(n, d, generator=generator).add_(x)
    return x, y, torch.randint(CLASSES, (n,), generator=generator)


def check() -> dict[str, float]:
    """The largest difference from dcor of each estimator at N = 1,000, d = 64, in float64."""
    import dcor

    x, y, labels = draw(1000, 64)
    x, y = x.double(), y.double()
    one_hot = torch.nn.functional.one_hot(labels).double()
    a, b, g = (rows.numpy() for rows in (x, y, one_hot))
    pairs = {
        "unbiased": (kdx.fss(x, y, permutations=0), dcor.u_distance_correlation_sqr(a, b)),
        "biased": (kdx.fss(x, y, "biased", permutations=0), dcor.distance_correlation_sqr(a, b)),
        "to classes": (kdx.rs(x, labels, permutations=0), dcor.u_distance_correlation_sqr(a, g)),
        "partial": (kdx.partial_rs(x, labels, y, permutations=0), dcor.partial_distance_correlation(a, g, b)),
    }
    found = {name: abs(score.value - float(known)) for name, (score, known) in pairs.items()}
    if max(found.values()) > 1e-9:
        raise SystemExit(f"the scores differ from dcor's: {found}")
    return found


def large(rounds: int) -> dict[str, Any]:
    x, y, labels = draw(*LARGE)
    side = sweep._side(LARGE[0], [rows_of(x, "x"), rows_of(y, "y")])

    def bare() -> None:
        for rows in (x, y):
            tiles = rows.split(side)
            for a, left in enumerate(tiles):
                for right in tiles[a:]:
                    left @ right.T

    cases: dict[str, Callable[[], object]] = {
        "bare": bare,
        "score": lambda: kdx.rs(x, labels, y, permutations=0),
        "permutations": lambda: kdx.rs(x, labels, y),
    }
    samples = paired(cases, rounds)
    ratios = {"ratio": ratio(samples, "score", "bare"), "ratio_permutations": ratio(samples, "permutations", "bare")}
    return {"n": LARGE[0], "d": LARGE[1], "side": side, "samples": samples, **ratios}


def memory(n: int, d: int) -> dict[str, float]:
    """One score and its permutations in a process that did nothing else: seconds, and bytes over what held the features."""
    x, y, labels = draw(n, d)
    before = peak_bytes()
    start = time.perf_counter()
    kdx.rs(x, labels, y)
    return {"n": n, "d": d, "seconds": time.perf_counter() - start, "over": peak_bytes() - before, "peak": peak_bytes()}


def permutations(rounds: int) -> dict[str, Any]:
    x, y, labels = draw(*MANY)
    cases: dict[str, Callable[[], object]] = {
        "classes": lambda: kdx.rs(x, labels, permutations=0),
        "classes, 999": lambda: kdx.rs(x, labels),
        "features": lambda: kdx.fss(x, y, permutations=0),
        "features, 999": lambda: kdx.fss(x, y),
    }
    samples = paired(cases, rounds)
    with_, without = ({name: np.array(samples[f"{name}{end}"]) for name in ("classes", "features")} for end in (", 999", ""))
    extra = {name: quartiles((with_[name] - without[name]) / without[name]) for name in without}
    return {"n": MANY[0], "d": MANY[1], "samples": samples, "extra": extra}


def batches() -> dict[str, float]:
    """Three models of 10,000 images in batches of 64, all scores with permutations: one call, and the same batch by batch."""
    n, d = 10_000, 512
    x, y, labels = draw(n, d)
    networks = {"student": x, "base": y, "teacher": x - y.roll(1, 1)}
    start = time.perf_counter()
    kdx.compare({"layer": networks}, labels, batch=64)
    middle = time.perf_counter()
    for part in torch.arange(n).split(64)[:-1]:
        kdx.compare({"layer": {role: rows[part] for role, rows in networks.items()}}, labels[part])
    end = time.perf_counter()
    return {"one call": middle - start, "a call a batch": end - middle, "ratio": (end - middle) / (middle - start)}


def dcor_holds(n: int) -> dict[str, float]:
    """dcor's score of n images beside kdx's; MemoryError, or an end by the system, where it cannot hold them."""
    import dcor

    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(known["MemAvailable"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (free, free))
    x, y, _ = draw(n, DCOR_WIDTH)
    start = time.perf_counter()
    try:
        value = dcor.u_distance_correlation_sqr(x.double().numpy(), y.double().numpy())
    except MemoryError:
        return {}
    middle = time.perf_counter()
    found = kdx.fss(x, y, permutations=0).value
    end = time.perf_counter()
    return {"n": n, "d": DCOR_WIDTH, "dcor": middle - start, "kdx": end - middle, "difference": abs(found - float(value))}


def dcor_limit() -> dict[str, float]:
    """The largest N of a series, each half again as large, that dcor can hold here."""
    held: dict[str, float] = {}
    n = 2_000
    while found := child("benchmarks.scores", "--case", f"dcor:{n}"):
        held, n = found, n * 3 // 2
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a child's
    options = parser.parse_args()
    if options.case is not None:
        name, _, size = options.case.partition(":")
        run: dict[str, Callable[[], Any]] = {
            "large": lambda: large(options.rounds),
            "permutations": lambda: permutations(options.rounds),
            "batches": batches,
            "dcor": lambda: dcor_holds(int(size)),
            "memory": lambda: memory(*map(int, size.split("x"))),
        }
        print(json.dumps(run[name]()))
        return

    def case(name: str) -> Any:
        return child("benchmarks.scores", "--case", name, "--rounds", str(options.rounds))

    found = {
        "differences from dcor": check(),
        "large": case("large") | {"memory": case(f"memory:{LARGE[0]}x{LARGE[1]}")},
        "huge": case(f"memory:{HUGE[0]}x{HUGE[1]}"),
        "permutations": case("permutations"),
        "batches": case("batches"),
        "dcor": dcor_limit(),
    }
    record = store("scores", "benchmarks.scores", found)
    Console().print(Markdown(readme.scores(record)))


if __name__ == "__main__":
    main()
