"""`kdx similarity`: the layers of two networks over a data set, their tables, heat maps and page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from kdx.disk import check_folder, check_locked, lock_folder, write_atomic
from kdx.errors import KdxError, resumable
from kdx.figure_files import FORMATS, figure_format
from kdx.report.similarity_page import similarity_page
from kdx.runs.number_text import number
from kdx.runs.similarity import NetworkSimilarity, compare_networks
from kdx.runs.similarity_options import SimilarityOptions
from kdx.runs.similarity_sums import FEATURES, remove_stored
from kdx.scores.similarity_result import Similarity

JSON, CSV, PAGE, FIGURE = "similarity.json", "similarity.csv", "report.html", "heatmap"
"""The files of a comparison; those of the figure have the endings .svg, .png and .pdf."""


def run(
    references: Mapping[str, str],
    data: str,
    out: Path,
    options: SimilarityOptions,
    *,
    figure: Path | None = None,
    command: Sequence[str] = (),
    announce: Callable[[str], None] = print,
) -> tuple[Path, Similarity]:
    """Compare networks with `kdx.runs.similarity.compare_networks`, and write the results into ``out``. Returns the page and the result.

    figure: one more file of the heat maps, as PNG, SVG or PDF. command: the command line, for the record. Files appear whole; the page is
    the last.
    """
    if figure is not None:
        figure_format(figure)  # fails before hours of work
    unused = [name for name, layers in options.layers.items() if layers and name not in references]
    if unused:
        raise KdxError(
            f"There is no network {unused[0]} for --layer-{unused[0].lower()}.", "Name it with --given, or leave its layers out."
        )
    _check_folder(out, figure)
    with lock_folder(out) as lock:
        comparison = compare_networks(references, data, out, options, announce)
        check_locked(out, lock)
        with resumable(lambda: True):  # the comparison's stored features and sums are still there
            page = write_results(comparison, out, figure=figure, command=command)
        remove_stored(out)
        return page, comparison.result


def _check_folder(out: Path, figure: Path | None) -> None:
    """KdxError if the folder contains anything other than a comparison, also one that was stopped."""
    if not (out / JSON).exists():
        own = {CSV, FEATURES, *(f"{FIGURE}.{ending}" for ending in FORMATS), *([] if figure is None else [figure.name])}
        check_folder(
            out, "a comparison", lambda path: path.name in own or path.name.startswith(tuple(f".{name}." for name in (*own, JSON)))
        )


def write_results(comparison: NetworkSimilarity, out: Path, *, figure: Path | None = None, command: Sequence[str] = ()) -> Path:
    """Write the JSON, the table, the heat maps and the page of a comparison. Returns the path of the page."""
    result = comparison.result
    for ending in FORMATS:
        result.save(out / f"{FIGURE}.{ending}")
    if figure is not None:
        result.save(figure)
    result.to_csv(out / CSV)
    content = json.dumps({"command": list(command), **comparison.to_dict()}, indent=1, allow_nan=False)
    write_atomic(out / JSON, content.encode())
    write_atomic(out / PAGE, similarity_page(comparison, command).encode("utf-8", "replace"))
    return out / PAGE


def matches_table(result: Similarity) -> Table:
    """For the terminal: each layer of A with the layer of B that is most similar to it."""
    table = Table(box=None, pad_edge=False)
    for heading in (
        "layer of A",
        "most similar in B",
        "distance correlation",
        "interval",
        "linear CKA",
        *(["partial"] if result.given else []),
    ):
        table.add_column(heading, justify="left" if "layer" in heading or "B" in heading.split() else "right", overflow="fold")
    for i, (a, b) in enumerate(result.best_matches().items()):
        j = result.layers_b.index(b)
        numbers = [number(float(result.values[i, j]), 3), f"{number(float(result.low[i, j]), 3)} to {number(float(result.high[i, j]), 3)}"]
        numbers.append(number(float(result.cka[i, j]), 3))
        if result.partial is not None:
            numbers.append(number(float(result.partial[i, j]), 3))
        table.add_row(Text(a), Text(b), *numbers)
    return table
