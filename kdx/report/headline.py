"""The sentence at the top of the page: the answer, per layer, to the main question that a run's roles allow."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kdx.roles import BALANCE, LEAD, LIKENESS
from kdx.runs.measured import Entry


@dataclass(frozen=True)
class Question:
    """A question about a score or a contrast, as clauses.

    above, below: the answers where it is above or below zero. unsettled: the question itself, where no layer answers it. unsettled_rest:
    the question in short, after an answer for other layers.
    """

    above: str
    below: str
    unsettled: str
    unsettled_rest: str


QUESTIONS = {
    LIKENESS: Question(
        "the student’s features are closer to the teacher’s than the base’s are",
        "the student’s features are further from the teacher’s than the base’s are",
        "whether the student’s or the base’s features are closer to the teacher’s",
        "which of the two is closer",
    ),
    BALANCE: Question(
        "what the student has beyond the base is more relevant to the labels than what the base has beyond the student",
        "what the base has beyond the student is more relevant to the labels than what the student has beyond the base",
        "whether the student or the base is more relevant to the labels beyond the other",
        "which of the two is more relevant beyond the other",
    ),
    LEAD: Question(
        "the student’s features are more relevant to the labels than the teacher’s",
        "the student’s features are less relevant to the labels than the teacher’s",
        "whether the student’s or the teacher’s features are more relevant to the labels",
        "which of the two is more relevant",
    ),
    "RS(S)": Question(
        "the student’s features are related to the labels",
        "the student’s features are negatively related to the labels",
        "whether the student’s features are related to the labels",
        "whether they are",
    ),
}
"""The question about each score or contrast. A run is asked the first one that it has the number for."""


def headline(numbers: Mapping[str, Mapping[str, Entry]], confidence: float) -> str:
    """numbers: the scores and contrasts of each layer by name."""
    present = next(name for name in QUESTIONS if all(name in by_name for by_name in numbers.values()))
    question, entries = QUESTIONS[present], {layer: by_name[present] for layer, by_name in numbers.items()}
    above = [layer for layer, entry in entries.items() if entry.direction(confidence) > 0]
    below = [layer for layer, entry in entries.items() if entry.direction(confidence) < 0]
    unsettled = [layer for layer in entries if layer not in above and layer not in below]
    parts = []
    if above:
        parts.append(f"{_at(above, entries)} {question.above}")
    if below:
        parts.append(f"{_at(below, entries)} {question.below}")
    if unsettled and not parts:
        return f"{_at(unsettled, entries)} these images do not settle {question.unsettled}."
    if unsettled:
        parts.append(f"{_at(unsettled, entries)} these images do not settle {question.unsettled_rest}")
    return "; ".join(part if i == 0 else part[0].lower() + part[1:] for i, part in enumerate(parts)) + "."


def _at(layers: Sequence[str], among: Collection[str]) -> str:
    if len(layers) <= 2:
        return f"At {' and '.join(layers)}"
    return f"At all {len(among)} layers" if len(layers) == len(among) else f"At {len(layers)} of {len(among)} layers"
