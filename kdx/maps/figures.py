"""Figures of maps with colour bars: PNG, SVG and PDF files, windows, and notebooks."""

from __future__ import annotations

import base64
import difflib
import html
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Unpack

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.figure_files import rendered, write_figure
from kdx.maps import overlays
from kdx.maps.drawing import FigureOptions, Panel, Sheet, draw
from kdx.roles import GAIN, MAPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = Array | Sequence[Any]
"""One image per map: an array [n, 3, H, W] or [n, H, W, 3], or a list of arrays or PIL images; each one as in `kdx.overlay`."""

_PER_LINE = 8  # maps per line where a figure has a single kind
_IN_NOTEBOOK = 8  # images that a notebook shows


DRAWN_KINDS = (GAIN, "RS(S)", "RS(B)", "distilled", "missed", "alone")
"""The kinds of map that a figure shows unless others are chosen. A figure of several images and layers shows the first one."""


class Drawable(ABC):
    """Results that draw themselves: ``result.show()``, ``result.save("figure.pdf")``, and their own picture in a notebook.

    Every method takes ``images``, one image per map, over which the maps are drawn, and these options:

    index: the image to draw, or a list of them; by default all. kinds: the kinds of map to draw, for results that have several.
    scale: ``common`` gives all maps of one kind and layer the same colours for the same values, so weak maps look weak; ``own`` draws each
    map on its own scale. Maps of classes always have their own, because their values are not comparable. cells: ``smoothed`` interpolates
    between the cells of a map; ``raw`` shows the cells as they are. colour_map: the name of a colour map of matplotlib instead of kdx's.
    edge: the longer edge of each picture in inches, by default 1.5. dpi: the resolution of PNG files, by default 200.

    Colours are those of `kdx.overlay`: dark violet to yellow-orange (matplotlib's inferno without its ends, whose lightness rises steadily)
    for maps that are never negative, blue and orange for signed maps. A colour bar states the values, and the grid of each map is
    printed beside its layer, because a smoothed map of few cells can look finer than it is.
    """

    @abstractmethod
    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        """The panels of the images at these places. ``images`` are all images, not only those."""

    @abstractmethod
    def _count(self) -> int:
        """The number of images."""

    def save(self, path: str | Path, images: Images | None = None, **options: Unpack[FigureOptions]) -> Path:
        """Write a figure as PNG, SVG or PDF, by the ending of ``path``; returns the path. Text in SVG and PDF stays text.

        The same results give the same bytes. Raises KdxError for another ending, for a number of images that differs from the number of
        maps, for an image or a kind that does not exist, and for more than 400 pictures.
        """
        return write_figure(path, lambda: self.figure(images, **options), options.get("dpi", 200))

    def show(self, images: Images | None = None, **options: Unpack[FigureOptions]) -> None:
        """Show the figure in a notebook or a window. Raises KdxError where matplotlib has no display."""
        import matplotlib
        from matplotlib import pyplot

        if matplotlib.get_backend().lower() in ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template"):
            raise KdxError("matplotlib has no display here, so the figure cannot be shown.", 'Write it to a file with .save("figure.png").')
        sheet, options = self._prepared(images, options)
        draw(sheet, options, lambda size: pyplot.figure(figsize=size))
        pyplot.show()

    def figure(self, images: Images | None = None, **options: Unpack[FigureOptions]) -> Figure:
        """The figure as a matplotlib Figure, to change it before it is written."""
        from matplotlib.figure import Figure

        sheet, options = self._prepared(images, options)
        return draw(sheet, options, lambda size: Figure(figsize=size))

    def _repr_html_(self) -> str:
        """A small picture for notebooks: a PNG in an <img> element, without scripts. It shows the first images."""
        count = self._count()
        shown = list(range(min(count, _IN_NOTEBOOK)))
        note = f"{count} images" if count == len(shown) else f"the first {len(shown)} of {count} images"
        title = html.escape(f"{type(self).__name__}: {note}")
        if not shown:
            return f"<p>{title}</p>"
        data = base64.b64encode(rendered(lambda: self.figure(index=shown, edge=1.1), "png", 100)).decode("ascii")
        return f'<figure><img src="data:image/png;base64,{data}" alt="{title}"><figcaption>{title}</figcaption></figure>'

    def _prepared(self, images: Images | None, options: FigureOptions) -> tuple[Sheet, FigureOptions]:
        unknown = sorted(set(options) - set(FigureOptions.__annotations__))
        if unknown:
            raise TypeError(f"figures have no option {unknown[0]!r}; they have {', '.join(FigureOptions.__annotations__)}")
        count = self._count()
        chosen = options.get("index", range(count))
        index = [chosen] if isinstance(chosen, int) else [int(place) for place in chosen]
        outside = [place for place in index if not -count <= place < count]
        if outside or not index:
            raise KdxError(f"There is no image {outside[0]}." if outside else "There is no image to draw.", f"There are {count} images.")
        pictures = None if images is None else [overlays.picture(image) for image in images]
        if pictures is not None:
            arrays.check_same(len(pictures), count, "images", "maps")
        return self._sheet(pictures, [place % count for place in index], options.get("kinds")), options


def map_array(maps: Array) -> NDArray[np.float64]:
    """Maps as float64 NumPy, with zero in place of values that are not finite."""
    return np.asarray(np.nan_to_num(arrays.tensor(maps, "maps").double().numpy(force=True), nan=0.0, posinf=0.0, neginf=0.0))


def grid_text(maps: NDArray[np.floating]) -> str:
    """The grid of maps [..., h, w], such as ``7 × 7``."""
    return f"{maps.shape[-2]} × {maps.shape[-1]}"


def contact_sheet(
    maps: Array, images: list[NDArray[np.uint8]] | None, index: Sequence[int], *, signed: bool, comparable: bool = True
) -> Sheet:
    """Maps [n, h, w] of a single kind, line by line."""
    values = map_array(maps)
    panels: list[Panel | None] = [
        Panel(values[place], None if images is None else images[place], signed, "maps", comparable) for place in index
    ]
    width = min(_PER_LINE, len(panels))
    panels += [None] * (-len(panels) % width)
    rows = [panels[start : start + width] for start in range(0, len(panels), width)]
    return Sheet(rows, [f"{grid_text(values)} cells", *[""] * (width - 1)], [""] * len(rows))


def single_kind(kinds: Sequence[str] | None) -> None:
    """Raises TypeError if ``kinds`` are given for a result that has a single kind of map."""
    if kinds is not None:
        raise TypeError("kinds chooses among several kinds of map, and this result has one")


def chosen_kinds(kinds: Sequence[str] | None, default: Sequence[str], present: Sequence[str]) -> list[str]:
    """The kinds of map to draw. Raises KdxError for one that the result does not have."""
    requested = [kinds] if isinstance(kinds, str) else list(kinds or [kind for kind in default if kind in present] or present[:1])
    for kind in requested:
        if kind not in present:
            near = difflib.get_close_matches(kind, present, n=3) or present
            raise KdxError(f"The result has no maps of the kind {kind!r}.", f"It has: {', '.join(near)}.")
    return requested


class MapsOfKind(Protocol):
    """Maps [n, h, w] of one kind."""

    @property
    def maps(self) -> Any: ...


def layers_sheet(
    layers: Mapping[str, Mapping[str, MapsOfKind]],
    images: Sequence[NDArray[np.uint8] | None] | None,
    index: Sequence[int],
    kinds: Sequence[str],
    names: Sequence[str] = (),
) -> Sheet:
    """One row per image: the image if there are images, then its maps of these kinds at every layer. names: of the rows.

    A place in ``images`` that is None stays empty, and the maps beside it are drawn alone.

    A kind is signed unless it is one of UniCAM's.
    """
    columns = [(layer, kind, map_array(of_layer[kind].maps)) for layer, of_layer in layers.items() for kind in kinds]
    titles = [column_title(layer, kind, maps) for layer, kind, maps in columns]
    rows: list[list[Panel | None]] = []
    for place in index:
        image = None if images is None else images[place]
        panels: list[Panel | None] = [] if images is None else [None if image is None else Panel(None, image)]
        rows.append([*panels, *(Panel(maps[place], image, kind not in MAPS, f"{layer}/{kind}") for layer, kind, maps in columns)])
    return Sheet(rows, titles if images is None else ["image", *titles], list(names) or [""] * len(rows))


def column_title(layer: str, kind: str, maps: NDArray[np.floating]) -> str:
    """The layer with its grid, and the kind of map; the kind with the grid if there is no name of a layer."""
    kind = kind.replace(" - ", " − ")
    return f"{layer} ({grid_text(maps)})\n{kind}" if layer else f"{kind} ({grid_text(maps)})"
