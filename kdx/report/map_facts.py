"""What the page states about the maps of each layer: their grid, what they add up to, how stable and how strong they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdx.report import wording
from kdx.report.kinds import CLEARLY_ABOVE_CHANCE, PageKind, score_entry
from kdx.runs.measured import MapSummary
from kdx.runs.record import RunRecord

COARSE = 4
"""A map with fewer cells than this along an edge localises little, and the page warns of it."""

MANY_EMPTY = 0.1
"""The page states the share of empty maps of a layer in a sentence where it is above this."""


@dataclass(frozen=True)
class KindFacts:
    """One kind of map at a layer, as text. A text is empty where the run does not know the number, or the kind does not have it.

    total: the sum of the maps of all images. score: the score that they add up to. stability: the median. above: the share of maps that
    are stronger than maps by chance.
    """

    kind: PageKind
    total: str
    score: str
    stability: str
    above: str
    empty: str


@dataclass(frozen=True)
class LayerFacts:
    """The maps of one layer. ``notes``: sentences about the first kind. ``warnings``: sentences that a reader must not miss."""

    layer: str
    grid: str
    notes: list[str]
    warnings: list[str]
    kinds: list[KindFacts]


def layer_facts(run: RunRecord, kinds: Sequence[PageKind], grids: Mapping[str, tuple[int, int]]) -> list[LayerFacts]:
    return [_of_layer(run, layer, kinds, grids[layer]) for layer in run.layers]


def grid_text(grid: tuple[int, int]) -> str:
    return f"{grid[0]} × {grid[1]}"


def map_sum(run: RunRecord, layer: str, kind: PageKind) -> float | None:
    """The sum of the maps of all images of a kind that adds up to a score; None where the run does not have the images' sums."""
    columns = run.map_columns(layer, kind.name) if kind.signed else None
    return None if columns is None else float(np.asarray(columns.total, dtype=np.float64).sum())


def _of_layer(run: RunRecord, layer: str, kinds: Sequence[PageKind], grid: tuple[int, int]) -> LayerFacts:
    facts = [_of_kind(run, layer, kind) for kind in kinds]
    return LayerFacts(layer, grid_text(grid), _notes(run, layer, facts[0]), _warnings(run, layer, kinds, grid), facts)


def _of_kind(run: RunRecord, layer: str, kind: PageKind) -> KindFacts:
    summary = run.map_summaries[layer].get(kind.name)
    total, entry = map_sum(run, layer, kind), score_entry(run, layer, kind.score)
    return KindFacts(
        kind,
        "" if total is None else wording.number(total, 3),
        wording.number(entry.value, 3) if entry is not None and kind.signed else "",
        "" if summary is None or summary.stability is None else wording.number(summary.stability),
        "" if summary is None or summary.above_null is None else wording.percent(summary.above_null, 0),
        "" if summary is None else wording.percent(summary.empty, 0),
    )


def _notes(run: RunRecord, layer: str, first: KindFacts) -> list[str]:
    kind, notes = first.kind, []
    if first.total:
        entry = score_entry(run, layer, kind.score)
        score = "" if entry is None else f"; the score {kind.label} is {first.score} ({wording.span(entry, 3)[1]})"
        notes.append(f"The maps of all {run.explained:,} images add up to {first.total}{score}.")
    if first.above:
        notes.append(f"{first.above} of the maps are stronger than 95% of maps by chance, that is, with permuted labels.")
    if first.stability:
        notes.append(f"Stability (median): {first.stability}.")
    return notes


def _warnings(run: RunRecord, layer: str, kinds: Sequence[PageKind], grid: tuple[int, int]) -> list[str]:
    warnings = []
    if min(grid) < COARSE:
        warnings.append(f"A map of {layer} has {grid_text(grid)} cells, so it localises little.")
    summaries: dict[PageKind, MapSummary] = {
        kind: run.map_summaries[layer][kind.name] for kind in kinds if kind.name in run.map_summaries[layer]
    }
    empty = [f"{wording.percent(s.empty, 0)} ({kind.label})" for kind, s in summaries.items() if s.empty > MANY_EMPTY]
    if empty:
        warnings.append(f"Empty maps, which are zero everywhere, at {layer}: {', '.join(empty)}.")
    chance = [kind.label for kind, s in summaries.items() if s.above_null is not None and s.above_null <= CLEARLY_ABOVE_CHANCE]
    if chance:
        warnings.append(f"No stronger than maps by chance at {layer}: {', '.join(chance)}.")
    return warnings
