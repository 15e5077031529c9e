"""Heat maps of the similarities of layers, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = NDArray[np.float64]

COLOURS = "viridis"
"""Its lightness rises steadily with the value, also for readers who do not distinguish red from green, and in print."""

_MOST_WRITTEN = 12
"""The most layers of a network for which the cells contain their values."""


def heat_maps(tables: Mapping[str, Table], layers_a: Sequence[str], layers_b: Sequence[str]) -> Figure:
    """One heat map per table [a, b], with its title, side by side with one scale of colours: from 0, or the lowest value, to 1."""
    from matplotlib.figure import Figure

    a, b, count = len(layers_a), len(layers_b), len(tables)
    longest = max(len(_short(name)) for name in (*layers_a, *layers_b))
    cell = 0.45 if max(a, b) <= _MOST_WRITTEN else 0.24
    margin = 0.5 + 0.075 * longest
    width, height = max(cell * b, 2.2), max(cell * a, 1.6)
    figure = Figure(figsize=(margin + count * (width + 0.35) + 0.8, height + margin + 0.9), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)[0]
    low = lowest(tables.values())
    for place, (axes, (title, table)) in enumerate(zip(grid, tables.items(), strict=True)):
        image = axes.pcolormesh(table, vmin=low, vmax=1.0, cmap=COLOURS)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.set_xticks(np.arange(b) + 0.5, [_short(layer) for layer in layers_b], rotation=90, fontsize=7, parse_math=False)
        names = [_short(layer) for layer in layers_a] if not place else [""] * a
        axes.set_yticks(np.arange(a) + 0.5, names, fontsize=7, parse_math=False)
        axes.tick_params(length=0)
        axes.set_xlabel("layers of B", fontsize=8)
        if not place:
            axes.set_ylabel("layers of A", fontsize=8)
        if max(a, b) <= _MOST_WRITTEN:
            _write_values(axes, table, low)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.9, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    return figure


def lowest(tables: Iterable[Table]) -> float:
    """The lower end of the scale of colours."""
    return min(0.0, *(float(table.min()) for table in tables))


def _write_values(axes: Axes, values: Table, low: float) -> None:
    for (i, j), value in np.ndenumerate(values):
        dark = (value - low) / (1 - low) < 0.6
        axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color="white" if dark else "black")


def _short(name: str, most: int = 28) -> str:
    """The end of a long name, which differs most between layers, without characters that are invalid in SVG."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= most else f"…{name[-most + 1 :]}"
