"""The page of `kdx similarity`: heat maps of all pairs of layers, their diagonal, best matches and tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdx.report.drawing import INK, LINES, WIDE, as_svg, elided, page_colour, page_figure, style_axes
from kdx.report.layout import DataCell, DataTable, render
from kdx.runs.number_text import number
from kdx.runs.similarity import NetworkSimilarity
from kdx.scores.similarity_figure import COLOURS, lowest
from kdx.scores.similarity_result import STATISTICS, Similarity, Statistic

if TYPE_CHECKING:
    from markupsafe import Markup

_MEANINGS: dict[Statistic, str] = {
    "values": "Unbiased distance correlation: 1 means the same geometry of the images, and 0 is expected for unrelated layers.",
    "cka": "Linear CKA with unbiased HSIC: the same ratio for linear kernels, in which directions of large variance dominate.",
    "partial": "What A and B share beyond C: the correlation after all compared layers of C are projected out of both.",
}

_MARKERS = ("o", "s", "D")

_MOST_WRITTEN = 12
"""The most layers of B for which the cells contain their values."""

_CHARACTER = 6.4
"""The width of a character of a layer's name, in points."""


@dataclass(frozen=True)
class _HeatMap:
    """A heat map for the page: title, meaning, and the drawing."""

    title: str
    meaning: str
    svg: Markup
    label: str


def similarity_page(comparison: NetworkSimilarity, command: Sequence[str] = ()) -> str:
    """The page as one HTML file. command: the command line that made it; () if there was none."""
    from importlib.metadata import version

    result = comparison.result
    return render(
        "similarity.html.j2",
        styles=("similarity.css",),
        scripts=("similarity.js",),
        kdx=version("kdx"),
        comparison=comparison,
        result=result,
        counts={"A": len(result.layers_a), "B": len(result.layers_b), "C": len(result.given)},
        headline=_headline(result),
        heat_maps=[_heat_map(result, statistic) for statistic in result.statistics],
        diagonal=_diagonal(result),
        series=[(STATISTICS[name], line, marker) for name, line, marker in zip(result.statistics, LINES, _MARKERS, strict=False)],
        scale=_scale(result),
        matches=[_matches(result)],
        tables=[_table(result, statistic) for statistic in result.statistics],
        command=shlex.join(command),
        facts=list(_facts({name: value for name, value in comparison.about.items() if name not in ("projected", "lowered")})),
    )


def _headline(result: Similarity) -> str:
    """The most similar pair of layers, in a sentence."""
    i, j = np.unravel_index(int(result.values.argmax()), result.values.shape)
    ends = f"{number(float(result.low[i, j]), 2)} to {number(float(result.high[i, j]), 2)}"
    pair = f"{result.layers_a[i]} of A and {result.layers_b[j]} of B"
    return f"The most similar layers are {pair}: distance correlation {number(float(result.values[i, j]), 2)} ({ends})."


def _intervals(result: Similarity, statistic: Statistic) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    if statistic == "values":
        return result.low, result.high
    if statistic == "partial" and result.partial_low is not None and result.partial_high is not None:
        return result.partial_low, result.partial_high
    return None


def _cell(result: Similarity, statistic: Statistic, i: int, j: int) -> DataCell:
    ends = _intervals(result, statistic)
    value = float(result.table(statistic)[i, j])
    return DataCell.of(value, None if ends is None else (float(ends[0][i, j]), float(ends[1][i, j])))


def _table(result: Similarity, statistic: Statistic) -> DataTable:
    rows = [
        [DataCell(layer), *(_cell(result, statistic, i, j) for j in range(len(result.layers_b)))] for i, layer in enumerate(result.layers_a)
    ]
    return DataTable(f"table-{statistic}", STATISTICS[statistic], ("layer of A \\ layer of B", *result.layers_b), rows)


def _matches(result: Similarity) -> DataTable:
    rows = []
    for i, (layer, match) in enumerate(result.best_matches().items()):
        j = result.layers_b.index(match)
        rows.append([DataCell(layer), DataCell(match), *(_cell(result, statistic, i, j) for statistic in result.statistics)])
    heads = [STATISTICS[statistic] for statistic in result.statistics]
    note = "The layer of B with the highest distance correlation. Where intervals overlap, another layer may match as well."
    return DataTable("best-matches", "Best match of each layer of A", ("layer of A", "layer of B", *heads), rows, note)


def _colours() -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps[COLOURS](np.linspace(0, 1, 256))]


def _scale(result: Similarity) -> tuple[str, str, str]:
    """The colours of the scale as a CSS gradient, and its ends in words."""
    return ", ".join(_colours()[::17]), number(lowest(result.tables.values()), 2), number(1.0, 2)


def _heat_map(result: Similarity, statistic: Statistic) -> _HeatMap:
    from markupsafe import Markup

    a, b = len(result.layers_a), len(result.layers_b)
    label = f"Heat map of {STATISTICS[statistic].lower()}, {a} layers of A by {b} layers of B. Arrow keys move through the cells."
    return _HeatMap(STATISTICS[statistic], _MEANINGS[statistic], Markup("".join(_svg(result, statistic))), label)


def _svg(result: Similarity, statistic: Statistic) -> Iterator[str]:
    """The drawing: one rectangle per pair of layers with its value as a tooltip, and the names of the layers."""
    a, b = result.layers_a, result.layers_b
    left = 14 + _CHARACTER * max(len(elided(name, 30)) for name in a)
    bottom = 22 + _CHARACTER * max(len(elided(name, 30)) for name in b)
    width = min(64.0, max(18.0, (WIDE - left - 8) / len(b)))
    height = min(34.0, max(16.0, width))
    low, colours, values = lowest(result.tables.values()), _colours(), result.table(statistic)
    total = left + width * len(b) + 8, 20 + height * len(a) + bottom
    frame = f'viewBox="0 0 {max(total[0], WIDE):.0f} {total[1]:.0f}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {frame} class="heat" aria-hidden="true" focusable="false" font-size="11">'
    for i, name in enumerate(a):
        y = 20 + height * (i + 0.5)
        yield f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="currentColor">{escape(elided(name, 30))}</text>'
    for j, name in enumerate(b):
        x, y = left + width * (j + 0.5), 20 + height * len(a) + 8
        turned = f'transform="rotate(-90 {x + 4:.1f} {y:.1f})" x="{x + 4:.1f}" y="{y:.1f}"'
        yield f'<text {turned} text-anchor="end" fill="currentColor">{escape(elided(name, 30))}</text>'
    yield f'<text x="{left:.1f}" y="13" fill="currentColor" font-weight="600">rows: A, columns: B</text>'
    ends = _intervals(result, statistic)
    for (i, j), value in np.ndenumerate(values):
        share = (float(value) - low) / (1 - low)
        x, y = left + width * j, 20 + height * i
        text = f"{a[i]} of A, {b[j]} of B: {number(float(value), 3)}"
        if ends is not None:
            text += f" ({number(float(ends[0][i, j]), 3)} to {number(float(ends[1][i, j]), 3)})"
        box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        place = f'data-row="{i}" data-column="{j}"'
        yield f'<rect {place} {box} fill="{colours[round(255 * share)]}"><title>{escape(text)}</title></rect>'
        if len(b) <= _MOST_WRITTEN:
            ink = "#ffffff" if share < 0.6 else "#000000"
            middle = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}"'
            yield f'<text {middle} text-anchor="middle" fill="{ink}" pointer-events="none">{number(float(value), 2)}</text>'
    yield "</svg>"


def _diagonal(result: Similarity) -> Markup | None:
    """The similarity of the layers at the same position, if both networks have equally many layers; else None."""
    from markupsafe import Markup

    count = len(result.layers_a)
    if count != len(result.layers_b) or count < 2:
        return None
    places = np.arange(count)
    height = 300
    with page_figure(height, WIDE) as figure:
        axes = figure.add_axes((0.07, 0.32, 0.91, 0.64))
        style_axes(axes, grid="y", label_size=10)
        axes.set(xlim=(-0.5, count - 0.5), ylim=(min(0.0, lowest(result.tables.values())) - 0.02, 1.03))
        for statistic, line, marker in zip(result.statistics, LINES, _MARKERS, strict=False):
            values = result.table(statistic).diagonal()
            colour, ends = page_colour(line), _intervals(result, statistic)
            if ends is not None:
                axes.vlines(places, ends[0].diagonal(), ends[1].diagonal(), color=colour, alpha=0.5, linewidth=2.5)
            axes.plot(places, values, color=colour, marker=marker, markersize=5, linewidth=1.5)
        step = -(-count // 24)
        names = [a if a == b else f"{elided(a, 12)} / {elided(b, 12)}" for a, b in zip(result.layers_a, result.layers_b, strict=True)]
        axes.set_xticks(places[::step], [elided(name, 26) for name in names][::step], rotation=60, ha="right", parse_math=False)
        axes.tick_params(labelcolor=INK)
        return Markup(as_svg(figure, "diagonal"))  # matplotlib has escaped the names


def _facts(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as lines of name and value."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{above}{name} · ")
        elif value is not None and value != ():
            yield f"{above}{name}", " × ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
