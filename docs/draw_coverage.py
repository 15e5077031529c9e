"""Draws the picture of docs/mathematics.md from benchmarks/results/coverage.json: ``python -m docs.draw_coverage``.

coverage.svg has the coverage of intervals by the number of images. The same command writes the table below the picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "coverage.json"
PICTURE = Path(__file__).with_name("coverage.svg")
PAGE = Path(__file__).with_name("mathematics.md")
START, END = "<!-- coverage -->", "<!-- /coverage -->"
COLOURS = ("#0072b2", "#d55e00", "#009e73")

Cell = Mapping[str, Any]


def cells(record: Mapping[str, Any], method: str = "kdx", *, two_directions: bool = False) -> list[Cell]:
    return [c for c in record["cells"] if c["method"] == method and ("two directions" in c["population"]) == two_directions]


def coverage(chosen: Iterable[Cell]) -> tuple[np.ndarray[Any, np.dtype[np.float64]], int]:
    """The coverage at each level over these cells, weighted by their draws, and the number of intervals."""
    rows = list(chosen)
    draws = [c["draws"] for c in rows]
    return np.average([c["coverage"] for c in rows], axis=0, weights=draws), sum(draws)


def draw(record: Mapping[str, Any]) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "kdx"
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for method, style in (("kdx", "-o"), ("jackknife", ":")):
        whole = [c for c in cells(record, method) if c["batches"] == 1]
        sizes = sorted({c["n"] for c in whole})
        for level, (stated, colour) in enumerate(zip(record["levels"], COLOURS, strict=True)):
            values = [100 * coverage(c for c in whole if c["n"] == n)[0][level] for n in sizes]
            label = f"{stated:.0%}" if method == "kdx" else None
            axes.plot(sizes, values, style, color=colour, label=label, markersize=4)
            if method == "kdx":
                axes.axhspan(100 * stated - 3, min(100, 100 * stated + 3), color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("images")
    axes.set_ylabel("intervals that contain the true score, %")
    axes.set_ylim(70, 100.5)
    axes.legend(title="stated", loc="lower right")
    figure.savefig(PICTURE, metadata={"Date": None})


def row(name: str, chosen: Iterable[Cell]) -> str:
    values, intervals = coverage(chosen)
    return f"| {name} | {intervals:,} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |"


def table(record: Mapping[str, Any]) -> str:
    whole = [c for c in cells(record) if c["batches"] == 1]
    hard = cells(record, two_directions=True)
    rows = [row(f"{n:,} images", (c for c in whole if c["n"] == n)) for n in sorted({c["n"] for c in whole})]
    rows += [row(f"{name}, 64 to 256 images", (c for c in whole if c["population"] == name and 64 <= c["n"] <= 256))
             for name in dict.fromkeys(c["population"] for c in whole)]  # fmt: skip
    rows += [row(f"{name}, 64 to 256 images", (c for c in hard if c["population"] == name and c["n"] >= 64))
             for name in dict.fromkeys(c["population"] for c in hard)]  # fmt: skip
    pooled = [c for c in cells(record) if c["batches"] > 1]
    for n, batches in sorted({(c["n"], c["batches"]) for c in pooled}):
        rows.append(row(f"{n:,} images in {batches} batches", (c for c in pooled if (c["n"], c["batches"]) == (n, batches))))
    for method, name in (("jackknife", "the jackknife alone, 64 images"), ("bootstrap", "percentiles of a bootstrap, 64 images")):
        same = {c["population"] for c in cells(record, "bootstrap")}
        rows.append(row(name, (c for c in cells(record, method) if c["n"] == 64 and c["batches"] == 1 and c["population"] in same)))
    return "\n".join(["| simulated sets | intervals | 80% | 95% | 99% |", "| --- | ---: | ---: | ---: | ---: |", *rows])


def main() -> None:
    record = json.loads(RESULT.read_text("utf-8"))
    draw(record)
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n{table(record)}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
