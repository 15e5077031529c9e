"""The tables and sentences of a study's page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from kdx.report.layout import DataCell, DataTable
from kdx.report.wording import probability
from kdx.roles import BALANCE, GAIN, LIKENESS, RELEVANCE
from kdx.runs.number_text import number
from kdx.runs.schema import PAGE
from kdx.study.statistics import ACCURACY, ACCURACY_GAIN, EXPECTED, Comparison, Estimate, Group, Question, StudyStatistics
from kdx.study.table import Cell, Study, accuracy_score

CLAIMS: dict[Question, str] = {
    "likeness": "A student is closer to its teacher than its base is: FSS(S,T) > FSS(B,T).",
    "balance": "A student has more relevance beyond its base than its base has beyond it: RS(S|B) > RS(B|S).",
    "capacity": "A larger teacher lowers the student’s FSS(S,T) or accuracy: the capacity gap.",
    "assistant": "An assistant raises the student’s accuracy, or its FSS(S,T) to the network that taught it: it narrows the gap.",
    "methods": "Two methods differ in accuracy, FSS(S,T) or RS(S).",
}
"""What each question asks, as a claim."""

OWN_TEACHER = (
    "With an assistant, T is the network that taught the student, which is the last assistant. The accuracy of T, FSS(S,T), FSS(B,T) and "
    "RS(T) then do not refer to the first teacher."
)
"""What a reader must know about the scores of students with assistants."""

_TOPICS: dict[Question, str] = {
    "likeness": "closer to the teacher",
    "balance": "relevance beyond the other",
    "capacity": "size of the teacher",
    "assistant": "assistant",
    "methods": "methods",
}

_SCORE_COLUMNS = ("FSS(S,T)", "FSS(B,T)", *RELEVANCE, "RS(S|B)", "RS(B|S)")

_ROLES = ("teacher", "base", "student")

State = Literal["settled", "opposite", "open", "unknown"]


@dataclass(frozen=True)
class ClaimCount:
    """A claim with the numbers of its tests that settle it, settle its opposite, settle neither, and that are not possible."""

    claim: str
    supported: int
    opposed: int
    open: int
    untested: int

    @property
    def state(self) -> State:
        """The mark beside the claim: settled or opposite where all tests that are possible agree."""
        tests = self.supported + self.opposed + self.open
        if not tests:
            return "unknown"
        return "settled" if self.supported == tests else "opposite" if self.opposed == tests else "open"

    @property
    def text(self) -> str:
        tests = self.supported + self.opposed + self.open
        if not tests:
            return f"Not tested: {_count(self.untested, 'difference')} with one seed or without a spread over seeds."
        parts = [f"Settled in {self.supported} of {_count(tests, 'test')}"]
        if self.opposed:
            parts.append(f"the opposite in {self.opposed}")
        if self.untested:
            parts.append(f"{self.untested} not tested")
        return ", ".join(parts) + "."


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def claim_counts(statistics: StudyStatistics) -> list[ClaimCount]:
    """The claims that the study has differences for. The last one, about methods, counts both directions as settled."""
    result = []
    for question, claim in CLAIMS.items():
        comparisons = [one for one in statistics.comparisons if one.question == question]
        if comparisons:
            tested = [_agreement(one, statistics) for one in comparisons if one.p_adjusted is not None]
            counts = (tested.count(1), tested.count(-1), tested.count(0), len(comparisons) - len(tested))
            result.append(ClaimCount(claim, *counts))
    return result


def _agreement(one: Comparison, statistics: StudyStatistics) -> int:
    """1 where a test settles the claim, -1 where it settles the opposite, else 0."""
    direction = one.direction(statistics.confidence)
    return direction * (EXPECTED[one.question] or direction)


def tests_table(statistics: StudyStatistics, *, several_data: bool) -> DataTable:
    """Every test of the page."""
    heads = ["question", *(["data"] if several_data else []), "networks and methods", "layer", "score"]
    rows = []
    for one in statistics.comparisons:
        words = [_TOPICS[one.question], *([one.data] if several_data else []), one.subject, one.layer or "–", _minus(one.score)]
        numbers = [estimate_cell(one.estimate, sign=True), DataCell(str(one.estimate.seeds), value=one.estimate.seeds)]
        rows.append(
            [*map(DataCell, words), *numbers, _p_cell(one.estimate.p_value), _p_cell(one.p_adjusted), DataCell(_result(one, statistics))]
        )
    return DataTable("tests", "All tests", (*heads, "difference", "seeds", "p", "p (Holm)", "result"), rows)


def _p_cell(p: float | None) -> DataCell:
    return DataCell("–") if p is None else DataCell(probability(p).removeprefix("p = ").removeprefix("p "), value=p)


def _result(one: Comparison, statistics: StudyStatistics) -> str:
    if one.p_adjusted is None:
        return "not tested"
    return {1: "above zero", -1: "below zero", 0: "not settled"}[one.direction(statistics.confidence)]


def _minus(name: str) -> str:
    return name.replace(" - ", " − ")


def estimate_cell(estimate: Estimate, *, sign: bool = False) -> DataCell:
    return DataCell.of(estimate.value, estimate.interval, sign=sign)


def _seeds_cell(estimate: Estimate) -> DataCell:
    return DataCell(str(estimate.seeds), "" if estimate.over_seeds else "over images", estimate.seeds)


def accuracy_table(statistics: StudyStatistics, data: str) -> DataTable:
    names = [*map(accuracy_score, _ROLES), ACCURACY_GAIN]
    heads = ("students", "teacher", "base", "student", "student − base", "seeds")
    rows = []
    for group in _groups(statistics, data):
        estimates = statistics.estimates[group]
        cells = [_optional(estimates.get(("", name)), sign=name == ACCURACY_GAIN) for name in names]
        rows.append([DataCell(group.label), *cells, _seeds_cell(estimates["", ACCURACY])])
    return DataTable(f"accuracy-{_slug(data)}", f"Accuracy on {data}", heads, rows)


def scores_table(statistics: StudyStatistics, data: str) -> DataTable:
    """The scores of every group and layer."""
    return _layer_table(statistics, data, f"scores-{_slug(data)}", f"Scores by layer, {data}", _SCORE_COLUMNS, sign=False)


def transfer_table(statistics: StudyStatistics, data: str) -> DataTable:
    """What each student has that its base does not, by layer."""
    table = _layer_table(statistics, data, f"transfer-{_slug(data)}", f"Student against base, {data}", (LIKENESS, GAIN, BALANCE), sign=True)
    groups = [(group, layer) for group in _groups(statistics, data) for layer in statistics.layers(group)]
    rows = [[*row, DataCell(_reading(statistics, *place))] for row, place in zip(table.rows, groups, strict=True)]
    return DataTable(table.name, table.title, [*map(_minus, table.columns), "mean over seeds"], rows)


def _layer_table(statistics: StudyStatistics, data: str, name: str, title: str, scores: Sequence[str], *, sign: bool) -> DataTable:
    groups = _groups(statistics, data)
    present = [score for score in scores if any(score == known for group in groups for _, known in statistics.estimates[group])]
    rows = [
        [
            DataCell(group.label),
            DataCell(layer),
            *(_optional(statistics.estimates[group].get((layer, score)), sign=sign) for score in present),
            _seeds_cell(next(e for (at, _), e in statistics.estimates[group].items() if at == layer)),
        ]
        for group in groups
        for layer in statistics.layers(group)
    ]
    return DataTable(name, title, ("students", "layer", *present, "seeds"), rows)


def _optional(estimate: Estimate | None, *, sign: bool = False) -> DataCell:
    return DataCell("–") if estimate is None else estimate_cell(estimate, sign=sign)


def _reading(statistics: StudyStatistics, group: Group, layer: str) -> str:
    """The signs of the means in words; they are not tests."""
    values = {name: statistics.estimates[group].get((layer, name)) for name in (LIKENESS, BALANCE)}
    words = {LIKENESS: ("closer to the teacher", "further from it"), BALANCE: ("more beyond the base", "less than the base")}
    known = [(name, estimate.value) for name, estimate in values.items() if estimate is not None and math.isfinite(estimate.value)]
    return ", ".join(words[name][value < 0] for name, value in known)


@dataclass(frozen=True)
class Failure:
    """A layer at which a student is worse than its base: RS(B|S) > RS(S|B). settled: whether the corrected test settles it."""

    students: str
    data: str
    layer: str
    difference: str
    settled: bool


def failures(statistics: StudyStatistics) -> list[Failure]:
    """Settled ones first, then by the size of the difference."""
    below = [one for one in statistics.comparisons if one.question == "balance" and one.estimate.value < 0]
    below.sort(key=lambda one: (one.direction(statistics.confidence), one.estimate.value))
    return [
        Failure(one.subject, one.data, one.layer, _with_interval(one.estimate), one.direction(statistics.confidence) < 0) for one in below
    ]


def _with_interval(estimate: Estimate) -> str:
    cell = estimate_cell(estimate, sign=True)
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


def method_table(statistics: StudyStatistics) -> DataTable:
    """How many students and layers of each method are better and worse than their base, by the means over seeds."""
    heads = (
        "method",
        "students",
        "student − base accuracy",
        "layers closer to the teacher",
        "layers with more relevance",
        "layers with less",
    )
    rows = []
    for method in dict.fromkeys(group.method for group in statistics.groups):
        groups = [group for group in statistics.groups if group.method == method]
        gains = [e.value for group in groups if (e := statistics.estimates[group].get(("", ACCURACY_GAIN))) is not None]
        cells = [
            DataCell(number(sum(gains) / len(gains), 3, sign=True), value=sum(gains) / len(gains)) if gains else DataCell("–"),
            *_share(statistics, groups, LIKENESS, 1),
            *_share(statistics, groups, BALANCE, 1),
            *_share(statistics, groups, BALANCE, -1),
        ]
        rows.append([DataCell(method), DataCell(str(len(groups)), value=len(groups)), *cells])
    return DataTable("method-summary", "What each method transferred", heads, rows)


def _share(statistics: StudyStatistics, groups: Sequence[Group], score: str, sign: int) -> Iterator[DataCell]:
    values = [e.value for group in groups for (_, name), e in statistics.estimates[group].items() if name == score]
    count = sum(value * sign > 0 for value in values)
    yield DataCell(f"{count} of {len(values)}", value=count) if values else DataCell("–")


def cells_table(study: Study, confidence: float, *, several_data: bool) -> DataTable:
    """Every student with a link to its own page. The intervals are over images."""
    heads = (*(["data"] if several_data else []), "student", "accuracy", "layer", *_SCORE_COLUMNS[:2], "RS(S)", "RS(S|B)", "RS(B|S)")
    by_cell: dict[str, dict[tuple[str, str], DataCell]] = {cell.key: {} for cell in study.cells}
    for m in study.measurements:
        by_cell[m.cell][m.layer, m.score] = DataCell.of(m.value, (m.low, m.high))
    rows = []
    for cell in study.cells:
        numbers, data = by_cell[cell.key], [DataCell(cell.data)] if several_data else []
        if not numbers:
            status = study.status.get(cell.key)
            state = "not computed yet" if status is None or status.state != "failed" else f"failed: {status.problem}"
            rows.append([*data, DataCell(student_label(cell)), DataCell(state), *[DataCell("–")] * (len(heads) - len(data) - 2)])
            continue
        name = DataCell(student_label(cell), link=page_link(cell))
        for layer in dict.fromkeys(layer for layer, _ in numbers if layer):
            scores = [numbers.get((layer, score), DataCell("–")) for score in heads[len(data) + 3 :]]
            rows.append([*data, name, numbers.get(("", ACCURACY), DataCell("–")), DataCell(layer), *scores])
    percent = number(100 * confidence, 0)
    return DataTable("every-student", f"Every student, with {percent}% intervals over images", heads, rows)


def student_label(cell: Cell) -> str:
    return f"{Group.of(cell).label}, seed {cell.seed}"


def page_link(cell: Cell) -> str:
    """The address of a student's own page, relative to that of the study."""
    return quote(f"{cell.folder}/{PAGE}")


def _groups(statistics: StudyStatistics, data: str) -> list[Group]:
    return [group for group in statistics.groups if group.data == data]


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)
