"""Drawings of the page as inline SVG in the colours of its theme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = tuple(f"line-{number}" for number in range(1, 7))
"""The page's colours for lines that are not networks, such as methods, in this order. Give each line a marker too."""

# matplotlib writes plain colours into its SVG. Each of these stands for a colour of the page's theme (light or dark) and is
# replaced by the style sheet's name after drawing. Drawings use these colours for nothing else.
_NAMES = ("teacher", "base", "student", "surface", "muted", "right", "wrong", *LINES)

_PAGE_COLOURS = {"#010203": "currentColor", **{f"#0102{4 + place:02x}": f"var(--{name})" for place, name in enumerate(_NAMES)}}

INK = "#010203"
"""The colour that stands for that of the text around a drawing."""

WIDTH = 360
"""The width of a drawing in points, if it has no other; its height follows from the width that the page gives it."""

WIDE = 760
"""The width of a wide drawing in points. It fills the page; on a narrow screen it scrolls inside its frame."""


def page_colour(name: str) -> str:
    """The colour that stands for a colour of the page: teacher, base, student, surface, muted, right, wrong, or one of `LINES`."""
    return f"#0102{4 + _NAMES.index(name):02x}"


def style_axes(axes: Axes, *, grid: Literal["x", "y", "both"] | None = None, label_size: int | None = None) -> None:
    """The style of all drawings: transparent, with a line at the bottom only, and with grid lines across the axis of the numbers."""
    axes.patch.set_alpha(0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_alpha(0.35)
    axes.tick_params(axis="both", length=0, labelcolor=INK, labelsize=label_size, pad=6 if label_size is None else 4)
    if grid is not None:
        axes.grid(axis=grid, color=INK, alpha=0.1, linewidth=1)
    axes.set_axisbelow(True)


@contextmanager
def page_figure(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A transparent figure of this height and width in points, with matplotlib's settings for drawings of the page, for `as_svg`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "kdx", "font.size": 11, "axes.edgecolor": INK, "text.color": INK}
    # The browser draws a glyph that matplotlib's own font lacks, so matplotlib's warning does not matter.
    with rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_alpha(0)
        yield figure


def as_svg(figure: Figure, prefix: str) -> str:
    """A figure as inline SVG, byte for byte the same for the same drawing. ``prefix`` makes its ids unique on the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
    return _for_page(out.getvalue(), prefix)


def elided(name: str, most: int = 46) -> str:
    """The name of a layer without characters that are invalid in SVG; an ellipsis replaces the middle of a long name."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def _for_page(svg: str, prefix: str) -> str:
    """The drawing without its file header, with the page's colours and with unique ids."""
    svg = svg[svg.index("<svg") :]
    for code, name in _PAGE_COLOURS.items():
        svg = svg.replace(code, name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
