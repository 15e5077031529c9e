"""Scores of classes and groups as they are stored: in scores.json, and as the tables scores_by_class.csv and scores_by_group.csv."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdx.runs.schema import StoredGroup, StoredScore, StoredScores, stored_score
from kdx.scores.groups import GroupScores


def stored_group(group: GroupScores) -> StoredGroup:
    """The scores and contrasts of a class or group in the form of scores.json. Two scores of a contrast compare the same images."""
    contrasts: dict[str, StoredScore] = {}
    for name, contrast in group.contrasts.items():
        first = group.scores[name.partition(" - ")[0]]
        contrasts[name] = {**contrast._asdict(), "n": first.n, "batches": first.batches}  # type: ignore[typeddict-item]
    return {
        "n": group.n,
        "scores": {name: stored_score(score) for name, score in group.scores.items()},
        "contrasts": contrasts,
        "missing": group.missing,
    }


GROUPED_TABLE_COLUMNS = ("layer", "group", "images", "score", "value", "low", "high", "p_value", "p_adjusted", "n", "missing")
"""The columns of scores_by_class.csv, where ``group`` is called ``class``, and scores_by_group.csv."""


def grouped_columns(kind: str) -> tuple[str, ...]:
    """The columns of the table of ``classes`` or ``groups``."""
    return tuple("class" if name == "group" and kind == "classes" else name for name in GROUPED_TABLE_COLUMNS)


def grouped_rows(scores: StoredScores, kind: str) -> Iterator[tuple[Any, ...]]:
    """The rows of the table of ``classes`` or ``groups``: every score and contrast, with a reason where there is no value."""
    for layer, entry in scores["layers"].items():
        groups: dict[str, StoredGroup] = entry.get("classes", {}) if kind == "classes" else entry.get("groups", {})
        for name, group in groups.items():
            for score, values in (group["scores"] | group["contrasts"]).items():
                numbers = values["value"], *values["interval"], values["p_value"], values.get("p_adjusted"), values["n"]
                yield layer, name, group["n"], score, *numbers, None
            for score, reason in group["missing"].items():
                yield layer, name, group["n"], score, *[None] * 6, reason
