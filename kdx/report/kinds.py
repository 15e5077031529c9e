"""The kinds of map that the page shows, in its order, and the layer at which it opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdx.roles import MAPS, SCORE_MAPS, counterpart
from kdx.runs.measured import Entry
from kdx.runs.record import RunRecord

_PAGE_ORDER = {
    "base": (
        "rs_student_minus_base",
        "rs_student",
        "rs_base",
        "rs_student_given_base",
        "fss_student_minus_base",
        "fss_student",
        "fss_base",
        *MAPS,
    ),
    "teacher": (
        "rs_student_minus_teacher",
        "rs_student",
        "rs_teacher",
        "rs_teacher_given_student",
        "fss_student",
        "fss_teacher",
        *MAPS,
    ),
    None: ("rs_student", *MAPS),
}
"""The kinds on the page, by the student's counterpart. The first is the map of what the student has and the counterpart does not. The
others that add up to a score are the parts of a difference on the page, and its relatives. Other maps are only in maps.zarr: with a base,
those over the teacher's positions and those given the student."""

_SHOWN_FIRST = {
    "base": ("rs_student_minus_base", "rs_student", "rs_base", "distilled"),
    "teacher": ("rs_student_minus_teacher", "rs_student", "rs_teacher", "missed"),
    None: ("rs_student", "alone"),
}
"""The kinds that the page shows until the reader chooses others, where a run has maps that add up to a score."""

CLEARLY_ABOVE_CHANCE = 0.1
"""Among maps by chance, 5% are stronger than the null's 95% quantile. The page counts maps as stronger than chance where this share is."""


@dataclass(frozen=True)
class PageKind:
    """A kind of map on the page. ``score``: the score that the maps add up to if they are ``signed``, else the score of the same roles.

    ``label`` names the kind in a caption, and ``symbol`` beside it is empty where the label is a symbol itself.
    """

    name: str
    label: str
    symbol: str
    score: str
    meaning: str
    signed: bool

    @property
    def title(self) -> str:
        return f"{self.label} ({self.symbol})" if self.symbol else self.label


def page_kinds(run: RunRecord) -> list[PageKind]:
    """The kinds of map on the run's page; the first is the page's first map."""
    return [_page_kind(name) for name in _PAGE_ORDER[counterpart(run.roles)] if name in run.map_kinds]


def shown_first(run: RunRecord, kinds: list[PageKind]) -> list[PageKind]:
    """The kinds that the page shows when it opens: all of UniCAM's in a run that has no others."""
    first = _SHOWN_FIRST[counterpart(run.roles)]
    return [kind for kind in kinds if kind.name in first] if any(kind.signed for kind in kinds) else kinds


def kinds_left_out(run: RunRecord) -> list[str]:
    """The names of the run's kinds of map that are not on the page."""
    return [name for name in run.map_kinds if name not in _PAGE_ORDER[counterpart(run.roles)]]


def score_entry(run: RunRecord, layer: str, score: str) -> Entry | None:
    """A score or a contrast of a layer by its name; None where the run does not have it."""
    return (run.scores[layer] | run.contrasts[layer]).get(score)


def opening_layer(run: RunRecord, kind: PageKind, grids: Mapping[str, tuple[int, int]]) -> str:
    """The layer with the finest grid among those whose maps of this kind pass their null, else among all; the last one of equals.

    A layer passes where the score of the maps is settled (`Entry.settled`: the interval excludes zero, and the permutation test rejects
    chance), and the share of maps that are stronger than the null's 95% quantile, if it is known, is above `CLEARLY_ABOVE_CHANCE`.
    """
    layers = list(run.layers)
    passing = [layer for layer in layers if _passes(run, layer, kind)]
    return max(passing or layers, key=lambda layer: (grids[layer][0] * grids[layer][1], layers.index(layer)))


def _passes(run: RunRecord, layer: str, kind: PageKind) -> bool:
    entry = score_entry(run, layer, kind.score)
    summary = run.map_summaries[layer].get(kind.name)
    above = None if summary is None else summary.above_null
    return entry is not None and entry.settled(run.confidence) and (above is None or above > CLEARLY_ABOVE_CHANCE)


def _page_kind(name: str) -> PageKind:
    if name in MAPS:
        kind = MAPS[name]
        return PageKind(name, name, kind.symbol, kind.score, kind.meaning, signed=False)
    score_map = SCORE_MAPS[name]
    return PageKind(name, score_map.symbol.replace(" - ", " − "), "", score_map.score, score_map.meaning, signed=True)
