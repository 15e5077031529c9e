"""How costs grow: exponents fitted to the stored times over n, d and N, and a drawing of the times."""

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
    """Median seconds of one variant over one size, with all other sizes equal."""

    label: str
    sizes: list[float]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """p of the least-squares fit of seconds = c size^p, in logarithms."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.seconds), 1)[0])


def curves(records: Records) -> dict[str, list[Curve]]:
    """For each size that grows, the curves of all variants with at least three sizes. Sizes without such a curve are left out."""
    by_size = {
        **{
            f"images n per batch, d = {d:,}": _over(records, "geometry", partial(_is_wide, d), lambda arguments: arguments["n"])
            for d in (25_088, 100_352)
        },
        "width d of a feature, n = 32": _over(records, "geometry", lambda arguments: arguments["n"] == 32, _width),
        "images N per score, d = 512": _over(records, "scores", lambda arguments: arguments["d"] == 512, lambda arguments: arguments["n"]),
    }
    return {title: lines for title, lines in by_size.items() if lines}


def _width(arguments: Mapping[str, Any]) -> int:
    return int(arguments["channels"] * arguments["height"] * arguments["width"])


def _is_wide(d: int, arguments: Mapping[str, Any]) -> bool:
    return _width(arguments) == d


def _over(
    records: Records, kind: str, selects: Callable[[Mapping[str, Any]], bool], size: Callable[[Mapping[str, Any]], float]
) -> list[Curve]:
    """The curves of the cases of a kind whose arguments are selected."""
    medians: dict[str, dict[float, float]] = {}
    for record in records.values():
        if record["kind"] == kind and selects(record["given"]):
            for variant, samples in record["samples"].items():
                medians.setdefault(variant, {})[size(record["given"])] = quartiles(samples)[1]
    return [
        Curve(variant, sorted(points), [points[size] for size in sorted(points)]) for variant, points in medians.items() if len(points) >= 3
    ]


def draw(records: Records, path: Path) -> None:
    """Draw the curves side by side on logarithmic axes, as SVG. Without curves, nothing is written."""
    import matplotlib
    from matplotlib.figure import Figure

    plots = curves(records)
    if not plots:
        return
    colours = {label: f"C{number}" for number, label in enumerate(sorted({line.label for lines in plots.values() for line in lines}))}
    with matplotlib.rc_context({"svg.hashsalt": "kdx", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5 * len(plots), 4), layout="constrained")
        for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(plots))), plots.items(), strict=True):
            for line in lines:
                label = f"{line.label}: exponent {line.exponent:.2f}"
                axes.loglog(line.sizes, line.seconds, marker="o", color=colours[line.label], label=label)
            sizes = sorted({size for line in lines for size in line.sizes})
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set_xticks([], minor=True)
            axes.set_xlabel(title)
            axes.set_ylabel("seconds")
            axes.grid(True, which="both", alpha=0.2)
            axes.legend(frameon=False, fontsize="small")
        figure.savefig(path, metadata={"Date": None})
