"""Which numbers of a study the page draws, and how."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kdx.report.plots import BEYOND_SERIES, RELEVANCE_SERIES, SIMILARITY_SERIES, Drawing, Series
from kdx.runs.training_scores import TrainingScores
from kdx.study.figures import Line, Mark, Row, interval_rows, line_panels, line_series
from kdx.study.statistics import ACCURACY, Comparison, Estimate, Group, Question, StudyStatistics
from kdx.study.table import accuracy_score

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_FIGURES = 8
"""The page draws at most so many figures of a kind, one per student network; the tables have all."""

_ACCURACY_SERIES = tuple(Series(accuracy_score(line.role), line.role, line.role, line.marker) for line in RELEVANCE_SERIES)

_SCORE_FIGURES = (
    ("fss", "Similarity to the teacher (FSS)", tuple(line for line in SIMILARITY_SERIES if line.role in ("student", "base")), False),
    ("rs", "Relevance to the labels (RS)", RELEVANCE_SERIES, False),
    ("beyond", "Relevance beyond the other network", tuple(line for line in BEYOND_SERIES if line.score in ("RS(S|B)", "RS(B|S)")), True),
)

_SETTLED = Series("settled", "settled after Holm’s correction", "student", "o")
_OPEN = Series("open", "not settled, or not tested", "muted", "o", filled=False)

_FOREST_TITLES: dict[Question, str] = {
    "likeness": "FSS(S,T) − FSS(B,T): closer to the teacher than the base",
    "balance": "RS(S|B) − RS(B|S): relevance beyond the other",
    "capacity": "Change per doubling of the teacher’s parameters",
    "assistant": "With an assistant, minus without",
    "methods": "One method minus another",
}

Families = Mapping[tuple[str, str], Sequence[Group]]
"""The groups by data set and student network."""


def families(statistics: StudyStatistics) -> Families:
    result: dict[tuple[str, str], list[Group]] = {}
    for group in statistics.groups:
        result.setdefault((group.data, group.student), []).append(group)
    return result


def _markup(svg: str) -> Markup:
    from markupsafe import Markup

    return Markup(svg)  # matplotlib has escaped the names


def _title(title: str, family: tuple[str, str], count: int) -> str:
    """The title of a figure, with the data set and the student if there are several."""
    return title if count == 1 else f"{title}: {family[1]} on {family[0]}"


def accuracy_drawings(statistics: StudyStatistics) -> list[Drawing]:
    all_families = families(statistics)
    result = []
    for place, (family, groups) in enumerate([*all_families.items()][:MOST_FIGURES]):
        series = [line for line in _ACCURACY_SERIES if any(("", line.score) in statistics.estimates[group] for group in groups)]
        rows = [_row(group, statistics.estimates[group], "", series) for group in groups]
        svg, zero = interval_rows({family[1]: rows}, f"accuracy-{place}")
        result.append(Drawing(_title("Accuracy", family, len(all_families)), series, _markup(svg), zero))
    return result


def score_drawings(statistics: StudyStatistics) -> list[Drawing]:
    """FSS, RS and RS beyond the other network, by layer."""
    all_families = families(statistics)
    result = []
    for place, (family, groups) in enumerate([*all_families.items()][:MOST_FIGURES]):
        for prefix, title, all_series, from_zero in _SCORE_FIGURES:
            names = {name for group in groups for _, name in statistics.estimates[group]}
            series = [line for line in all_series if line.score in names]
            if not series:
                continue
            layers = dict.fromkeys(layer for group in groups for layer in statistics.layers(group))
            blocks = {layer: [_row(group, statistics.estimates[group], layer, series) for group in groups] for layer in layers}
            svg, zero = interval_rows(blocks, f"{prefix}-{place}", from_zero=from_zero)
            result.append(Drawing(_title(title, family, len(all_families)), series, _markup(svg), zero))
    return result


def _row(group: Group, estimates: Mapping[tuple[str, str], Estimate], layer: str, series: Sequence[Series]) -> Row:
    marks = [Mark(line, e.value, e.interval) for line in series if (e := estimates.get((layer, line.score))) is not None]
    return Row(_short(group), marks)


def _short(group: Group) -> str:
    """The group without its student, which the figure names."""
    return f"{' → '.join((group.teacher, *group.assistants))}, {group.method}"


def forest_drawings(statistics: StudyStatistics, questions: Sequence[Question]) -> list[Drawing]:
    """A forest plot per question: one row per difference, in blocks by score and layer, filled where it is settled."""
    result = []
    for question in questions:
        comparisons = [one for one in statistics.comparisons if one.question == question]
        if comparisons:
            blocks: dict[str, list[Row]] = {}
            for one in comparisons:
                blocks.setdefault(_block(one), []).append(_difference_row(one, statistics))
            svg, zero = interval_rows(blocks, f"forest-{question}", from_zero=True)
            result.append(Drawing(_FOREST_TITLES[question], [_SETTLED, _OPEN], _markup(svg), zero))
    return result


def _block(one: Comparison) -> str:
    score = "accuracy" if one.score == ACCURACY else one.score if one.question not in ("likeness", "balance") else ""
    return " at ".join(part for part in (score, one.layer) if part)


def _difference_row(one: Comparison, statistics: StudyStatistics) -> Row:
    settled = one.direction(statistics.confidence) != 0
    data = f"{one.data}: " if len({group.data for group in statistics.groups}) > 1 else ""
    return Row(data + one.subject, [Mark(_SETTLED if settled else _OPEN, one.estimate.value, one.estimate.interval, faint=not settled)])


def capacity_drawings(statistics: StudyStatistics, parameters: Mapping[tuple[str, str], int]) -> list[Drawing]:
    """Accuracy and FSS(S,T) of a student by the size of its teacher, with and without assistants; for students of several teachers."""
    all_families = families(statistics)
    result: list[Drawing] = []
    for place, (family, groups) in enumerate(all_families.items()):
        sizes = {group.teacher: parameters.get((group.data, group.teacher), 0) for group in groups}
        if len(set(sizes.values())) < 2 or not all(sizes.values()) or len(result) == MOST_FIGURES:
            continue
        ordered = sorted(sizes, key=lambda teacher: (sizes[teacher], teacher))
        ticks = [(math.log2(sizes[teacher]), f"{teacher} ({parameter_text(sizes[teacher])})") for teacher in ordered]
        layers = dict.fromkeys(layer for group in groups for layer in statistics.layers(group))
        names = {"accuracy": ("", ACCURACY), **{f"FSS(S,T) at {layer}": (layer, "FSS(S,T)") for layer in layers}}
        kinds = list(dict.fromkeys((group.method, group.assistants) for group in groups))
        methods = list(dict.fromkeys(method for method, _ in kinds))
        series = {kind: _kind_series(methods.index(kind[0]), kind) for kind in kinds}
        panels = {
            heading: [_by_size(statistics, groups, kind, series[kind], name, sizes) for kind in kinds] for heading, name in names.items()
        }
        svg = line_panels(panels, f"capacity-{place}", "teacher (parameters)", ticks, shared=False)
        title = _title("The student by the size of its teacher", family, len(all_families))
        result.append(Drawing(title, list(series.values()), _markup(svg), zero=False))
    return result


def _kind_series(place: int, kind: tuple[str, tuple[str, ...]]) -> Series:
    method, assistants = kind
    return line_series(place, f"{method} with {' → '.join(assistants)}" if assistants else method, filled=not assistants)


def _by_size(
    statistics: StudyStatistics,
    groups: Sequence[Group],
    kind: tuple[str, tuple[str, ...]],
    series: Series,
    name: tuple[str, str],
    sizes: Mapping[str, int],
) -> Line:
    ordered = sorted((group for group in groups if (group.method, group.assistants) == kind), key=lambda group: sizes[group.teacher])
    known = [(group, statistics.estimates[group][name]) for group in ordered if name in statistics.estimates[group]]
    x = [math.log2(sizes[group.teacher]) for group, _ in known]
    return Line(series, x, [e.value for _, e in known], [e.interval for _, e in known], dashed=bool(kind[1]))


def parameter_text(count: int) -> str:
    """A number of parameters with about three digits, such as 11.7 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


Probes = Mapping[Group, Sequence[TrainingScores]]
"""The scores during the training of the seeds of a group."""


def training_drawings(probes: Probes) -> list[Drawing]:
    """FSS(S,T) and RS(S) over the epochs, the mean of the seeds, one line per method; one figure per chain of networks."""
    chains: dict[tuple[str, str], list[Group]] = {}
    for group in probes:
        chains.setdefault((group.data, group.chain), []).append(group)
    result = []
    for place, ((data, chain), groups) in enumerate([*chains.items()][:MOST_FIGURES]):
        for score in ("FSS(S,T)", "RS(S)"):
            series = {group: line_series(number, group.method) for number, group in enumerate(groups)}
            layers = dict.fromkeys(layer for group in groups for each in probes[group] for layer in each.layers)
            panels = {layer: [line for group in groups for line in _epochs(probes[group], layer, score, series[group])] for layer in layers}
            panels = {layer: lines for layer, lines in panels.items() if lines}
            if panels:
                svg = line_panels(panels, f"epochs-{place}-{'fss' if score[0] == 'F' else 'rs'}", "epoch")
                title = f"{score} during training: {chain}" + (f" on {data}" if len({d for d, _ in chains}) > 1 else "")
                result.append(Drawing(title, list(series.values()), _markup(svg), zero=True))
    return result


def _epochs(probes: Sequence[TrainingScores], layer: str, score: str, series: Series) -> Iterator[Line]:
    """The mean over the seeds at the epochs that all seeds have."""
    by_seed = [
        {epoch: value for epoch, value in zip(each.epochs, each.layers[layer][score], strict=True) if value is not None}
        for each in probes
        if score in each.layers.get(layer, {})
    ]
    epochs = [epoch for epoch in by_seed[0] if all(epoch in values for values in by_seed)] if by_seed else []
    if epochs:
        yield Line(series, epochs, [sum(values[epoch] for values in by_seed) / len(by_seed) for epoch in epochs])
