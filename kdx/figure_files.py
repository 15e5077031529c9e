"""Figures of matplotlib as files whose bytes depend on nothing but the figure."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdx.disk import write_atomic
from kdx.errors import KdxError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")


def rendered(make: Callable[[], Figure], format_: str, dpi: float = 200) -> bytes:
    """The figure that ``make`` draws as PNG, SVG or PDF. Text in SVG and PDF stays text. The same figure gives the same bytes."""
    from matplotlib import rc_context

    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format_, {})
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "kdx", "svg.fonttype": "none", "pdf.fonttype": 42, "image.composite_image": False}):
        make().savefig(out, format=format_, dpi=dpi, metadata=metadata)
    return out.getvalue()


def write_figure(path: str | Path, make: Callable[[], Figure], dpi: float = 200) -> Path:
    """Write a figure as PNG, SVG or PDF, by the ending of ``path``; returns the path. Raises KdxError for another ending."""
    path = Path(path)
    write_atomic(path, rendered(make, figure_format(path), dpi))
    return path


def figure_format(path: Path) -> str:
    """The format of a figure, one of `FORMATS`, by the ending of ``path``. Raises KdxError for another ending."""
    format_ = path.suffix.lower().removeprefix(".")
    if format_ not in FORMATS:
        raise KdxError(f"No figure can be written as {path.name}.", "Give a path that ends in .png, .svg or .pdf.")
    return format_
