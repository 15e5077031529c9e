"""Heat maps of the similarities of layers, drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kdx.scores.similarity_result import STATISTICS, Similarity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

COLOURS = "viridis"
"""Its lightness rises steadily with the value, also for readers who do not distinguish red from green, and in print."""

_MOST_WRITTEN = 12
"""The most layers of a network for which the cells contain their values."""


def heat_maps(similarity: Similarity) -> Figure:
    """One heat map per statistic, side by side with one scale of colours: 0 to 1, or from the lowest value if that is negative."""
    from matplotlib.figure import Figure

    a, b, count = len(similarity.layers_a), len(similarity.layers_b), len(similarity.statistics)
    longest = max(len(_short(name)) for name in (*similarity.layers_a, *similarity.layers_b))
    cell = 0.45 if max(a, b) <= _MOST_WRITTEN else 0.24
    margin = 0.5 + 0.075 * longest
    width, height = max(cell * b, 2.2), max(cell * a, 1.6)
    figure = Figure(figsize=(margin + count * (width + 0.35) + 0.8, height + margin + 0.9), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)[0]
    low = lowest(similarity)
    for place, (axes, name) in enumerate(zip(grid, similarity.statistics, strict=True)):
        image = axes.pcolormesh(similarity.table(name), vmin=low, vmax=1.0, cmap=COLOURS)
        axes.invert_yaxis()
        axes.set_title(STATISTICS[name], fontsize=10)
        axes.set_xticks(np.arange(b) + 0.5, [_short(layer) for layer in similarity.layers_b], rotation=90, fontsize=7, parse_math=False)
        names = [_short(layer) for layer in similarity.layers_a] if not place else [""] * a
        axes.set_yticks(np.arange(a) + 0.5, names, fontsize=7, parse_math=False)
        axes.tick_params(length=0)
        axes.set_xlabel("layers of B", fontsize=8)
        if not place:
            axes.set_ylabel("layers of A", fontsize=8)
        if max(a, b) <= _MOST_WRITTEN:
            _write_values(axes, similarity.table(name), low)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.9, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    return figure


def lowest(similarity: Similarity) -> float:
    """The lower end of the scale of colours."""
    return min(0.0, *(float(similarity.table(name).min()) for name in similarity.statistics))


def _write_values(axes: Axes, values: NDArray[np.float64], low: float) -> None:
    for (i, j), value in np.ndenumerate(values):
        dark = (value - low) / (1 - low) < 0.6
        axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color="white" if dark else "black")


def _short(name: str, most: int = 28) -> str:
    """The end of a long name, which differs most between layers, without characters that are invalid in SVG."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= most else f"…{name[-most + 1 :]}"
