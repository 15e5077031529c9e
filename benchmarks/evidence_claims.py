"""The claims of docs/evidence.md as differences that are expected to be positive, and their verdicts over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.evidence_design import ASSISTED_TEACHER, DATA, LAYERS, METHODS, STUDENTS, TEACHERS, Student
from benchmarks.evidence_measuring import PUBLISHED
from kdx.scores.uncertainty import holm
from kdx.study.statistics import over_seeds

Record = Mapping[str, Any]
Run = Mapping[str, Any]
"""The measurements of one seed on one data set."""

LAST = LAYERS[-1]
"""The layer of the verdicts, which was chosen before the measurement."""

DIRECT = tuple(student for student in STUDENTS if not student.assisted)
CONDITIONAL, DIFFERENCE = "decomposition of RS(S|B), RS(B|S)", "decomposition of RS(S) − RS(B)"
PUBLISHED_MAPS = "UniCAM, batches of 5"
ALPHA = 0.05


@dataclass(frozen=True)
class Variant:
    """How a claim is tested: which scores and which maps of the record."""

    title: str
    scores: str
    maps: str


VARIANTS = (Variant("as published", PUBLISHED, PUBLISHED_MAPS), Variant("decomposition and the whole set", "whole", CONDITIONAL))


@dataclass(frozen=True)
class Claim:
    """A claim as a difference that it expects to be positive. value: the difference for a run, a layer and a variant."""

    text: str
    value: Callable[[Run, str, Variant], float]


def _place(measure: str, sign: int) -> Callable[[Run, str, Variant], float]:
    """A measure of the residual maps minus that of the distilled ones, times ``sign``, as a mean over all students without assistant."""

    def value(run: Run, layer: str, variant: Variant) -> float:
        places = [run["students"][student.name][layer]["maps"][variant.maps] for student in DIRECT]
        return sign * float(np.mean([place["residual"][measure] - place["distilled"][measure] for place in places]))

    return value


def _score(run: Run, student: Student, layer: str, variant: Variant, name: str) -> float:
    return float(run["students"][student.name][layer]["scores"][variant.scores][name])


def _difference(first: str, second: str) -> Callable[[Run, str, Variant], float]:
    """The difference of two scores, as a mean over all students without assistant."""
    return lambda run, layer, variant: float(
        np.mean([_score(run, student, layer, variant, first) - _score(run, student, layer, variant, second) for student in DIRECT])
    )


def likeness(run: Run, layer: str, variant: Variant, teacher: str, *, assisted: bool = False) -> float:
    """FSS(S,T) of the students under a teacher, with or without the assistant, as a mean over the methods."""
    return float(np.mean([_score(run, Student(method, teacher, assisted), layer, variant, "FSS(S,T)") for method in METHODS]))


def _gap(run: Run, layer: str, variant: Variant) -> float:
    """FSS(S,T) under the smallest teacher minus that under the largest one."""
    return likeness(run, layer, variant, TEACHERS[0]) - likeness(run, layer, variant, TEACHERS[-1])


def _assistant(run: Run, layer: str, variant: Variant) -> float:
    """FSS(S,T) with the assistant minus that without, both with the same teacher as T."""
    assisted = likeness(run, layer, variant, ASSISTED_TEACHER, assisted=True)
    return assisted - likeness(run, layer, variant, ASSISTED_TEACHER)


CLAIMS = (
    Claim("Distilled features are nearer the object than residual ones", _place("distance", 1)),
    Claim("Residual features spread to the background", _place("background", 1)),
    Claim("The student gains relevance: RS(S\\|B) > RS(B\\|S)", _difference("RS(S|B)", "RS(B|S)")),
    Claim("The student is nearer the teacher than the base is: FSS(S,T) > FSS(B,T)", _difference("FSS(S,T)", "FSS(B,T)")),
    Claim("A larger teacher lowers FSS(S,T)", _gap),
    Claim("An assistant raises FSS(S,T)", _assistant),
)


@dataclass(frozen=True)
class Verdict:
    """A mean over seeds, its 95% interval by Student's t, the p-value of the two-sided t test after Holm, and the number of seeds with a
    positive difference."""

    mean: float
    interval: tuple[float, float]
    p_adjusted: float
    positive: int
    seeds: int

    @property
    def word(self) -> str:
        if self.p_adjusted > ALPHA:
            return "not settled"
        return "holds" if self.mean > 0 else "**contradicted**"


def verdicts(record: Record, layer: str = LAST) -> dict[tuple[int, str, int], Verdict]:
    """The verdicts by number of the claim, data set, and number of the variant. Holm's correction covers all of them together."""
    keys = [(claim, data, variant) for claim in range(len(CLAIMS)) for data in DATA for variant in range(len(VARIANTS))]
    series = {key: np.array([CLAIMS[key[0]].value(run, layer, VARIANTS[key[2]]) for run in runs(record, key[1])]) for key in keys}
    estimates = {key: over_seeds(values.tolist(), 0.95) for key, values in series.items()}
    tested = {key: estimate.p_value for key, estimate in estimates.items() if estimate.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        key: Verdict(estimates[key].value, estimates[key].interval, adjusted.get(key, 1.0), int((values > 0).sum()), len(values))
        for key, values in series.items()
    }


def runs(record: Record, data: str) -> list[Run]:
    return [run for run in record["runs"] if run["data"] == data]
