"""What the seeds of a study settle: means with intervals, paired differences, and tests that are corrected for their number."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import optimize, stats

from kdx.roles import BALANCE, LIKENESS
from kdx.scores.uncertainty import holm, t_quantile
from kdx.study.table import Cell, Study, accuracy_score

ACCURACY = accuracy_score("student")

ACCURACY_GAIN = f"{ACCURACY} - {accuracy_score('base')}"
"""The student's accuracy minus the base's, per seed."""

COMPARED = (ACCURACY, "FSS(S,T)", "RS(S)")
"""The scores by which methods are compared."""

GAP = (ACCURACY, "FSS(S,T)")
"""The scores that fall with the size of the teacher where there is a capacity gap."""

ALL_PAIRS = 4
"""Up to this many methods are compared pair by pair; of more, each is compared with the first."""

POWER = 0.8
"""The probability with which `detectable` differences are found."""

_SAME = 1e-12
"""A spread below this share of the values is rounding."""

Question = Literal["likeness", "balance", "capacity", "assistant", "methods"]

EXPECTED: dict[Question, int] = {"likeness": 1, "balance": 1, "capacity": -1, "assistant": 1, "methods": 0}
"""The sign that the paper claims for the difference of each question; 0 where it claims none.

likeness: FSS(S,T) - FSS(B,T). balance: RS(S|B) - RS(B|S). capacity: the change of FSS(S,T) or of the student's accuracy per doubling of the
teacher's parameters. assistant: with minus without assistants. methods: one method minus another.
"""


@dataclass(frozen=True, order=True)
class Group:
    """Cells that differ only by their seed; see `kdx.study.table.Cell`."""

    data: str
    teacher: str
    assistants: tuple[str, ...]
    student: str
    method: str

    @classmethod
    def of(cls, cell: Cell) -> Group:
        return cls(cell.data, cell.teacher, cell.assistants, cell.student, cell.method)

    @property
    def chain(self) -> str:
        """The networks in the order in which they teach."""
        return " → ".join((self.teacher, *self.assistants, self.student))

    @property
    def label(self) -> str:
        return f"{self.chain}, {self.method}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    interval: Student's t interval of the mean. With one seed it is the interval over the images of that seed, which does not contain the
    spread over seeds; it is NaN where there is none. p_value: of the two-sided t test that the mean is zero; None with one seed, and where
    all seeds have exactly the same value, whose spread is not known. The interval describes the mean of seeds like these, not a new seed.
    """

    value: float
    interval: tuple[float, float]
    seeds: int
    p_value: float | None = None

    @property
    def over_seeds(self) -> bool:
        """Whether the interval is over seeds, and not over images."""
        return self.seeds > 1


@dataclass(frozen=True)
class Comparison:
    """One test of the page.

    subject: the networks and methods in words, and data: their data set. layer: of the student; empty for an accuracy. p_adjusted: the
    p-value after Holm's correction for all tests of the study; None where the test is not possible (`Estimate.p_value`).
    """

    question: Question
    data: str
    subject: str
    layer: str
    score: str
    estimate: Estimate
    p_adjusted: float | None = None

    def direction(self, confidence: float) -> int:
        """1 or -1 where the corrected test settles that the difference is above or below zero, else 0."""
        if self.p_adjusted is None or self.p_adjusted > 1 - confidence:
            return 0
        return 1 if self.estimate.value > 0 else -1


@dataclass(frozen=True)
class StudyStatistics:
    """The statistics of a study. groups: in the order of the plan. estimates: group -> (layer, score) -> estimate. seeds: the fewest and
    the most seeds of a group."""

    confidence: float
    groups: tuple[Group, ...]
    estimates: Mapping[Group, Mapping[tuple[str, str], Estimate]]
    comparisons: tuple[Comparison, ...]
    seeds: tuple[int, int]

    def layers(self, group: Group) -> list[str]:
        """The student's layers, in the order of the network."""
        return list(dict.fromkeys(layer for layer, _ in self.estimates[group] if layer))


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of one value per seed, x +/- t s/sqrt(n) with the quantile t of n - 1 degrees of freedom and the standard deviation s.

    A value that is not finite is left out. For one value the interval is NaN; for none, all numbers are.
    """
    known = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    if len(known) < 2:
        return Estimate(float(known[0]) if len(known) else math.nan, (math.nan, math.nan), len(known))
    mean, spread = float(known.mean()), float(known.std(ddof=1))
    if spread <= _SAME * float(np.abs(known).max()):
        return Estimate(mean, (mean, mean), len(known))
    error = spread / math.sqrt(len(known))
    reach = t_quantile(confidence, len(known)) * error
    return Estimate(mean, (mean - reach, mean + reach), len(known), float(2 * stats.t.sf(abs(mean) / error, len(known) - 1)))


def detectable(seeds: int, confidence: float = 0.95) -> float:
    """The smallest difference, in standard deviations over seeds, that a two-sided t test of so many seeds finds with probability `POWER`.

    It is that of a single test; a corrected one needs a larger difference. It integrates the normal
    distribution over that of the estimated standard deviation. Raises ValueError for
    fewer than two seeds.
    """
    if seeds < 2:
        raise ValueError("a test needs at least two seeds")
    ranks = (np.arange(4096) + 0.5) / 4096
    deviations = np.sqrt(stats.chi2.ppf(ranks, seeds - 1) / (seeds - 1))  # estimated over true standard deviation, equally likely values
    reach = t_quantile(confidence, seeds) * deviations

    def excess(effect: float) -> float:
        shift = effect * math.sqrt(seeds)
        return float((stats.norm.sf(reach - shift) + stats.norm.cdf(-reach - shift)).mean()) - POWER

    return float(optimize.brentq(excess, 1e-3, 100))


def study_statistics(study: Study, parameters: Mapping[tuple[str, str], int], confidence: float = 0.95) -> StudyStatistics:
    """The statistics of the complete cells of a study.

    parameters: of each teacher, by data set and name; without those of all teachers of a student, the student has no test of the capacity
    gap. confidence: of the intervals, and 1 minus the level of the tests.

    All differences are paired: they are taken within a seed, between networks on the same images. Seeds that one of the two sides does not
    have are left out.
    """
    values = _values(study)
    groups = tuple(values)
    estimates = _estimates(study, values, confidence)
    comparisons = [
        *_claims(groups, estimates),
        *_capacity(values, parameters, confidence),
        *_assistants(values, confidence),
        *_methods(values, confidence),
    ]
    counts = [len(by_name["", ACCURACY]) for by_name in values.values()]
    return StudyStatistics(confidence, groups, estimates, tuple(_corrected(comparisons)), (min(counts, default=0), max(counts, default=0)))


Name = tuple[str, str]
"""Layer and score."""

BySeed = Mapping[int, float]

_Values = dict[Group, dict[Name, dict[int, float]]]


def _values(study: Study) -> _Values:
    """Every number by group, name and seed, in the order of the plan; groups without a complete cell are left out."""
    cells = {cell.key: cell for cell in study.cells}
    values: _Values = {Group.of(cell): defaultdict(dict) for cell in study.cells}
    for measurement in study.measurements:
        cell = cells[measurement.cell]
        values[Group.of(cell)][measurement.layer, measurement.score][cell.seed] = measurement.value
    for by_name in values.values():
        base = by_name.get(("", accuracy_score("base")))
        if base:
            by_name["", ACCURACY_GAIN] = _difference(by_name["", ACCURACY], base)
    return {group: dict(by_name) for group, by_name in values.items() if by_name}


def _difference(more: BySeed, less: BySeed) -> dict[int, float]:
    return {seed: more[seed] - less[seed] for seed in more if seed in less}


def _estimates(study: Study, values: _Values, confidence: float) -> dict[Group, dict[Name, Estimate]]:
    """The means over seeds. Of one seed, the interval is that over images, where the study has one."""
    groups = {cell.key: Group.of(cell) for cell in study.cells}
    images = {(groups[m.cell], (m.layer, m.score)): (m.low, m.high) for m in study.measurements if math.isfinite(m.value)}

    def estimate(group: Group, name: Name) -> Estimate:
        result = over_seeds([*values[group][name].values()], confidence)
        return result if result.over_seeds else replace(result, interval=images.get((group, name), result.interval))

    return {group: {name: estimate(group, name) for name in by_name} for group, by_name in values.items()}


def _claims(groups: Sequence[Group], estimates: Mapping[Group, Mapping[Name, Estimate]]) -> Iterator[Comparison]:
    contrasts: tuple[tuple[Question, str], ...] = (("likeness", LIKENESS), ("balance", BALANCE))
    for question, score in contrasts:
        for group in groups:
            for layer, name in estimates[group]:
                if name == score:
                    yield Comparison(question, group.data, group.label, layer, score, estimates[group][layer, name])


def _capacity(values: _Values, parameters: Mapping[tuple[str, str], int], confidence: float) -> Iterator[Comparison]:
    """The slope of a score by the binary logarithm of the teacher's parameters, per seed, for students without assistants."""
    for groups in _grouped(values, lambda g: (g.data, g.student, g.method), where=lambda g: not g.assistants):
        data, student, method = groups[0].data, groups[0].student, groups[0].method
        sizes = [math.log2(parameters.get((data, group.teacher), 1)) for group in groups]
        if len(set(sizes)) < 2 or not all(sizes):
            continue
        for layer, score in _common_names(values, groups, GAP):
            sides = [values[group][layer, score] for group in groups]
            slopes = [_slope(sizes, [side[seed] for side in sides]) for seed in _common_seeds(sides)]
            subject = f"{student}, {method}: per doubling of the teacher"
            yield Comparison("capacity", data, subject, layer, score, over_seeds(slopes, confidence))


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares."""
    centred = np.asarray(x) - np.mean(x)
    return float(centred @ np.asarray(y) / (centred @ centred))


def _assistants(values: _Values, confidence: float) -> Iterator[Comparison]:
    for group in values:
        without = replace(group, assistants=())
        if group.assistants and without in values:
            subject = f"{group.chain} minus {without.chain}, {group.method}"
            yield from _paired("assistant", values, group, without, subject, GAP, confidence)


def _methods(values: _Values, confidence: float) -> Iterator[Comparison]:
    for groups in _grouped(values, lambda g: (g.data, g.teacher, g.assistants, g.student)):
        pairs = combinations(groups, 2) if len(groups) <= ALL_PAIRS else ((groups[0], other) for other in groups[1:])
        for first, second in pairs:
            subject = f"{second.method} minus {first.method}, {first.chain}"
            yield from _paired("methods", values, second, first, subject, COMPARED, confidence)


def _paired(
    question: Question, values: _Values, more: Group, less: Group, subject: str, scores: Collection[str], confidence: float
) -> Iterator[Comparison]:
    for layer, score in _common_names(values, (more, less), scores):
        difference = _difference(values[more][layer, score], values[less][layer, score])
        yield Comparison(question, more.data, subject, layer, score, over_seeds([*difference.values()], confidence))


def _grouped(
    values: _Values, key: Callable[[Group], tuple[object, ...]], where: Callable[[Group], bool] = lambda _: True
) -> Iterator[list[Group]]:
    """The groups with equal keys, several each."""
    by_key = defaultdict(list)
    for group in values:
        if where(group):
            by_key[key(group)].append(group)
    yield from (groups for groups in by_key.values() if len(groups) > 1)


def _common_names(values: _Values, groups: Sequence[Group], scores: Collection[str]) -> list[Name]:
    return [name for name in values[groups[0]] if name[1] in scores and all(name in values[group] for group in groups)]


def _common_seeds(sides: Sequence[BySeed]) -> list[int]:
    return [seed for seed in sides[0] if all(seed in side for side in sides)]


def _corrected(comparisons: Sequence[Comparison]) -> Iterator[Comparison]:
    """All comparisons with their p-values adjusted by `holm` for the number of tests among them."""
    adjusted = iter(holm([one.estimate.p_value for one in comparisons if one.estimate.p_value is not None]))
    for one in comparisons:
        yield one if one.estimate.p_value is None else replace(one, p_adjusted=next(adjusted))
