"""How cost grows: exponents fitted to the stored times over n, d and N, and a drawing of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import quartiles

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Curve:
    """Median seconds of one way over one size, everything else the same."""

    label: str
    sizes: list[float]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """p of the least-squares fit of seconds = c size^p, in logarithms."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.seconds), 1)[0])


def curves(records: Records) -> dict[str, list[Curve]]:
    """Curves of every way with three sizes or more, by what grows; without those that have none."""
    found = {
        **{
            f"images n of a batch, d = {d:,}": _over(records, "geometry", partial(_is_wide, d), lambda given: given["n"])
            for d in (25_088, 100_352)
        },
        "width d of a feature, n = 32": _over(records, "geometry", lambda given: given["n"] == 32, _width),
        "images N of a score, d = 512": _over(records, "scores", lambda given: given["d"] == 512, lambda given: given["n"]),
    }
    return {title: lines for title, lines in found.items() if lines}


def _width(given: Mapping[str, Any]) -> int:
    return int(given["channels"] * given["height"] * given["width"])


def _is_wide(d: int, given: Mapping[str, Any]) -> bool:
    return _width(given) == d


def _over(
    records: Records, kind: str, among: Callable[[Mapping[str, Any]], bool], size: Callable[[Mapping[str, Any]], float]
) -> list[Curve]:
    found: dict[str, dict[float, float]] = {}
    for record in records.values():
        if record["kind"] == kind and among(record["given"]):
            for way, samples in record["samples"].items():
                found.setdefault(way, {})[size(record["given"])] = quartiles(samples)[1]
    return [Curve(way, sorted(points), [points[size] for size in sorted(points)]) for way, points in found.items() if len(points) >= 3]


def draw(records: Records, path: Path) -> None:
    """The curves side by side, on logarithmic axes, as SVG; nothing where there are none."""
    import matplotlib
    from matplotlib.figure import Figure

    found = curves(records)
    if not found:
        return
    colours = {label: f"C{number}" for number, label in enumerate(sorted({line.label for lines in found.values() for line in lines}))}
    with matplotlib.rc_context({"svg.hashsalt": "kdx", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
        for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
            for line in lines:
                label = f"{line.label}: power {line.exponent:.2f}"
                axes.loglog(line.sizes, line.seconds, marker="o", color=colours[line.label], label=label)
            sizes = sorted({size for line in lines for size in line.sizes})
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set_xticks([], minor=True)
            axes.set_xlabel(title)
            axes.set_ylabel("seconds")
            axes.grid(True, which="both", alpha=0.2)
            axes.legend(frameon=False, fontsize="small")
        figure.savefig(path, metadata={"Date": None})
