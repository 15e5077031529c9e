"""The similarity of every layer of one network with every layer of another, as a table, a figure and a picture in a notebook."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdx.disk import csv_text, write_atomic
from kdx.errors import KdxError
from kdx.figure_files import rendered, write_figure
from kdx.scores.similarity_figure import heat_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistic = Literal["values", "cka", "partial"]

STATISTICS: dict[Statistic, str] = {
    "values": "Distance correlation",
    "cka": "Linear CKA",
    "partial": "Partial distance correlation",
}
"""The names of the tables of a `Similarity`."""

COLUMNS = ("layer_a", "layer_b", "distance_correlation", "low", "high", "cka", "partial", "partial_low", "partial_high")
"""The columns of the CSV file."""


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarities of the layers of two networks; every array is float64 [a, b] in [-1, 1], without NaN.

    layers_a [a], layers_b [b]: the names of the layers, in the order of the networks.
    values: squared distance correlations (unbiased). low, high: the ends of their confidence intervals over other samples of images.
    cka: linear CKA with unbiased HSIC. partial: what A and B share beyond a third network C, or None without one.
    n: the number of images. geometry: ``whole`` if all images are one set, ``batch`` if inner products are summed over ``batches``.
    partial_low, partial_high: the intervals of ``partial``. given: the layers of C. confidence: of the intervals.

    `kdx.similarity` has the formulas and says what the numbers do not mean.
    """

    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    cka: NDArray[np.float64]
    partial: NDArray[np.float64] | None
    n: int
    geometry: str
    partial_low: NDArray[np.float64] | None = None
    partial_high: NDArray[np.float64] | None = None
    given: tuple[str, ...] = ()
    batches: int = 1
    confidence: float = 0.95

    def best_matches(self, statistic: Statistic = "values") -> dict[str, str]:
        """For each layer of A, the layer of B with the highest value; the first of several with the same value.

        ``statistic``: ``values``, ``cka`` or ``partial``. Where intervals overlap, another layer may match as well.
        """
        table = self.table(statistic)
        return {layer: self.layers_b[int(place)] for layer, place in zip(self.layers_a, table.argmax(1), strict=True)}

    def table(self, statistic: Statistic = "values") -> NDArray[np.float64]:
        """The values [a, b] of a statistic. Raises KdxError for ``partial`` without a third network, and ValueError for other names."""
        if statistic not in STATISTICS:
            raise ValueError(f"there is no statistic {statistic!r}: choose one of {', '.join(STATISTICS)}")
        values: NDArray[np.float64] | None = getattr(self, statistic)
        if values is None:
            raise KdxError("There is no partial correlation without a third network.", "Give its features as given=.")
        return values

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The names of the tables that there are."""
        return tuple(name for name in STATISTICS if name != "partial" or self.partial is not None)

    def to_csv(self, path: str | Path | None = None) -> str:
        """The table as CSV with one row per pair of layers and every digit; also written to ``path`` if there is one."""
        text = csv_text(COLUMNS, self._rows())
        if path is not None:
            write_atomic(Path(path), text.encode("utf-8", "replace"))
        return text

    def to_dict(self) -> dict[str, Any]:
        """The content as lists, for JSON."""
        arrays = ("values", "low", "high", "cka", "partial", "partial_low", "partial_high")
        tables = {name: None if getattr(self, name) is None else getattr(self, name).tolist() for name in arrays}
        return {
            "layers_a": list(self.layers_a),
            "layers_b": list(self.layers_b),
            "given": list(self.given),
            "n": self.n,
            "geometry": self.geometry,
            "batches": self.batches,
            "confidence": self.confidence,
            **tables,
        }

    def figure(self) -> Figure:
        """Heat maps of all statistics as a matplotlib Figure, to change it before it is written."""
        return heat_maps(self.tables, self.layers_a, self.layers_b)

    @property
    def tables(self) -> dict[str, NDArray[np.float64]]:
        """The tables [a, b] of all statistics by their titles."""
        return {STATISTICS[name]: self.table(name) for name in self.statistics}

    def save(self, path: str | Path, *, dpi: float = 200) -> Path:
        """Write the heat maps as PNG, SVG or PDF, by the ending of ``path``; returns the path. The same results give the same bytes.

        Raises KdxError for another ending.
        """
        return write_figure(path, self.figure, dpi)

    def _rows(self) -> Iterator[list[Any]]:
        for i, a in enumerate(self.layers_a):
            for j, b in enumerate(self.layers_b):
                tables = (self.values, self.low, self.high, self.cka, self.partial, self.partial_low, self.partial_high)
                yield [a, b, *(None if table is None else float(table[i, j]) for table in tables)]

    def _repr_html_(self) -> str:
        """The heat maps for notebooks: a PNG in an <img> element, without scripts."""
        title = html.escape(f"Similarity: {len(self.layers_a)} x {len(self.layers_b)} layers, {self.n:,} images")
        data = base64.b64encode(rendered(self.figure, "png", 100)).decode("ascii")
        return f'<figure><img src="data:image/png;base64,{data}" alt="{title}"><figcaption>{title}</figcaption></figure>'
