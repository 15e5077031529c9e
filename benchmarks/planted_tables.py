"""The tables of docs/evidence.md, from the stored result of `benchmarks.planted`. `benchmarks.readme` writes them into the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from benchmarks.markdown import header, joined, row
from benchmarks.planted import CASES, LAYERS
from benchmarks.record import RESULTS
from kdx.data.planted_cues import CUES

PATH = RESULTS / "planted.json"
CONTROLS = tuple(name for name in CASES if name not in CUES)
TITLES = {
    "neither knows": "neither knows the cue",
    "both know": "both know the cue",
    "irrelevant": "the cue is irrelevant",
}
"""The headings of the controls."""

Record = Mapping[str, Any]


@cache
def stored() -> Record:
    record: Record = json.loads(PATH.read_text())
    return record


def summary(record: Record) -> str:
    """For each map and layer: the densities over all kinds of cue and seeds, and in how many runs the planted region has the higher one."""
    lines = header("map", *LAYERS)
    for name in map_names(record):
        cells = []
        for layer in LAYERS:
            planted, common = (figures(record, CUES, layer, name, f"density {region}") for region in ("planted", "common"))
            wins = sum(p > c for p, c in zip(planted, common, strict=True))
            cells.append(f"{_mean(planted)} / {_mean(common)} ({wins} of {len(planted)})")
        lines.append(row(_escaped(name), *cells))
    return joined(lines) + "\n\n" + origin(record)


def peaks(record: Record) -> str:
    """For each map and layer: the share of images whose highest position is in the planted region: planted and irrelevant cues."""
    groups: dict[str, Sequence[str]] = {"planted": CUES, "irrelevant": ["irrelevant"]}
    lines = header("map", *(f"{layer}: {title}" for layer in LAYERS for title in groups))
    for name in map_names(record):
        shares = [np.mean(figures(record, cases, layer, name, "peak planted")) for layer in LAYERS for cases in groups.values()]
        lines.append(row(_escaped(name), *(f"{100 * share:.0f}%" for share in shares)))
    return joined(lines) + "\n"


def densities(layer: str) -> Callable[[Record], str]:
    """One layer's densities per kind of cue: means and ranges over the seeds."""

    def table(record: Record) -> str:
        lines = header(layer, *CUES)
        for name in map_names(record):
            cells = [
                " / ".join(_spread(figures(record, [cue], layer, name, f"density {region}")) for region in ("planted", "common"))
                for cue in CUES
            ]
            lines.append(row(_escaped(name), *cells))
        return joined(lines) + "\n"

    return table


def controls(layer: str) -> Callable[[Record], str]:
    """One layer's density and signed density in the planted region: with the planted colour, and in the controls."""

    def table(record: Record) -> str:
        lines = header(layer, "planted colour", *(TITLES[name] for name in CONTROLS))
        for name in map_names(record):
            cells = []
            for case in ("colour", *CONTROLS):
                density, signed = (_spread(figures(record, [case], layer, name, f"{key} planted")) for key in ("density", "signed"))
                cells.append(f"{density}; {signed}")
            lines.append(row(_escaped(name), *cells))
        return joined(lines) + "\n"

    return table


def sums(record: Record) -> str:
    """How RS(S) - RS(B) and RS(S|B) are divided over the regions, per case and layer."""
    gain, conditional = "decomposition of RS(S) − RS(B)", "decomposition of RS(S|B)"
    columns = ("total", "sum planted", "sum common")
    lines = header(
        "case", "layer", *(_escaped(f"{score}: {part}") for score in ("RS(S) − RS(B)", "RS(S|B)") for part in ("all", "cue", "glyph"))
    )
    for case in CASES:
        for layer in LAYERS:
            cells = [_spread(figures(record, [case], layer, name, key)) for name in (gain, conditional) for key in columns]
            lines.append(row(TITLES.get(case, case), layer, *cells))
    return joined(lines) + "\n"


def networks(record: Record) -> str:
    """The accuracies of the networks and the scores of their layers, per case."""
    runs = record["runs"]
    lines = header("case", "student: both, cue, glyph", "base: both, cue, glyph", *(f"{layer}: FSS(S,B), RS(B\\|S)" for layer in LAYERS))
    for case in CASES:
        of_case = [run for run in runs if run["case"] == case]
        accuracies = [
            ", ".join(f"{np.mean([run['accuracy'][role][images] for run in of_case]):.2f}" for images in ("both", "cue", "glyph"))
            for role in ("student", "base")
        ]
        scores = [
            ", ".join(_mean([run["layers"][layer]["scores"][score] for run in of_case]) for score in ("FSS(S,B)", "RS(B|S)"))
            for layer in LAYERS
        ]
        lines.append(row(TITLES.get(case, case), *accuracies, *scores))
    return joined(lines) + "\n"


def origin(record: Record) -> str:
    """Where the figures come from."""
    setting, environment = record["setting"], record["environment"]
    return (
        f"{setting['seeds']} seeds; networks of width {setting['width']}, trained for {setting['epochs']} epochs on "
        f"{setting['training images']:,} images; maps of {setting['test images']} test images. {environment['processor']}, "
        f"{environment['threads']} thread, PyTorch {environment['torch']}; {record['processor_seconds'] / 60:.0f} minutes of processor "
        f"time; commit {record['commit']}.\n"
    )


TABLES: dict[str, Callable[[Record], str]] = {
    "summary": summary,
    "peaks": peaks,
    **{f"densities {layer}": densities(layer) for layer in LAYERS},
    **{f"controls {layer}": controls(layer) for layer in LAYERS},
    "sums": sums,
    "networks": networks,
}


def map_names(record: Record) -> list[str]:
    return list(record["runs"][0]["layers"][LAYERS[0]]["maps"])


def figures(record: Record, cases: Sequence[str], layer: str, name: str, key: str) -> list[float]:
    """One measure of one map in all runs of these cases."""
    return [run["layers"][layer]["maps"][name][key] for run in record["runs"] if run["case"] in cases]


def _mean(values: Sequence[float]) -> str:
    return _number(float(np.mean(values)))


def _spread(values: Sequence[float]) -> str:
    """The mean and the range."""
    return f"{_mean(values)} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")
