"""The tables and drawings of several students side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdx.report import plots, wording
from kdx.report.comparison import Comparison, correct_among
from kdx.report.drawing import LINES
from kdx.report.layout import DataCell, DataTable
from kdx.report.plots import Drawing, Series
from kdx.roles import BALANCE, CONDITIONAL, GAIN, LIKENESS, RELEVANCE, SCORES, SIMILARITY
from kdx.runs.measured import Entry
from kdx.scores.uncertainty import accuracy, holm, sign_test

_DRAWN = (
    ("fss", "Similarity to the teacher", "FSS(S,T)", "FSS(B,T)", False),
    ("likeness", "Similarity beyond the base’s", LIKENESS, None, True),
    ("rs", "Relevance to the labels", "RS(S)", "RS(B)", True),
    ("gain", "Relevance beyond the base’s", GAIN, None, True),
    ("distilled", "What the student has beyond the base", "RS(S|B)", None, True),
    ("balance", "Student beyond base against base beyond student", BALANCE, None, True),
)
"""Prefix, title, number of each drawing, the base's number beside it, and whether its axis always includes zero."""

_MARKERS = ("o", "s", "D")

_UNKNOWN = Entry(math.nan, (math.nan, math.nan))


def students_table(comparison: Comparison) -> DataTable:
    """One row per student: its network, its accuracy on the common images, and where its predictions differ from the first student's.

    The p-value is that of the exact sign test over the images that exactly one of the two classifies correctly (McNemar), adjusted for the
    number of students by Holm's method.
    """
    runs, images = comparison.runs, comparison.images
    first, confidence = comparison.names[0], comparison.first.confidence
    right = {name: correct_among(run, images) for name, run in runs.items()}
    only = {name: (int((own & ~right[first]).sum()), int((right[first] & ~own).sum())) for name, own in right.items() if name != first}
    p_values = dict(zip(only, holm([sign_test(*counts) for counts in only.values()]), strict=True))
    rows = []
    for name, run in runs.items():
        known = accuracy(right[name], confidence)
        network = run.networks["student"]
        parameters = DataCell("–") if network.parameters is None else DataCell(f"{network.parameters:,}", value=network.parameters)
        row = [DataCell(name), DataCell(network.reference), parameters]
        row.append(DataCell.of(known["value"], (known["interval"][0], known["interval"][1])))
        if name == first:
            row += [DataCell("–")] * 3
        else:
            row += [DataCell(f"{count:,}", value=count) for count in only[name]]
            row.append(DataCell(wording.probability(p_values[name]).removeprefix("p = "), value=p_values[name]))
        rows.append(row)
    columns = ("Student", "Network", "Parameters", "Accuracy", f"Only it is right, not {first}", f"Only {first} is right", "p")
    note = (
        f"Accuracies are those of the {len(images):,} common images, with {wording.percent(confidence, 0)} intervals. p is that of the "
        f"exact sign test against {first}, adjusted for {len(only)} {'comparison' if len(only) == 1 else 'comparisons'} by Holm’s method."
    )
    return DataTable("students-table", "The students", columns, rows, note)


def ordered_numbers(comparison: Comparison) -> list[str]:
    """The scores and differences of the runs, each difference after its scores."""
    first = [name for name in (*SIMILARITY, LIKENESS, *RELEVANCE, GAIN, *CONDITIONAL, BALANCE) if name in comparison.numbers]
    return [*first, *(name for name in comparison.numbers if name not in first)]


def score_tables(comparison: Comparison) -> list[DataTable]:
    """One table per layer: a row per score or difference, and a column per student."""
    tables = []
    for place, (layer, own) in enumerate(comparison.layers.items()):
        rows = []
        for number in ordered_numbers(comparison):
            entries = [comparison.entry(student, layer, number) for student in comparison.names]
            if any(entries):
                rows.append([DataCell(number.replace(" - ", " − ")), *(_cell(entry, number not in SCORES) for entry in entries)])
        other = sorted({name for name in own if name not in (None, layer)}, key=str)
        note = ""
        if other:
            names = ", ".join(f"{student} {name}" for student, name in zip(comparison.names, own, strict=True) if name is not None)
            note = f"The students’ layers: {names}."
        tables.append(DataTable(f"scores-{place}", f"Scores at {layer}", ("Score", *comparison.names), rows, note))
    return tables


def difference_tables(comparison: Comparison) -> list[DataTable]:
    """One table per layer: a row per score or difference, and a column per student with its value minus the first student's.

    Empty if no run has the data that the intervals need.
    """
    first, paired = comparison.names[0], comparison.paired
    without = [name for name in comparison.names[1:] if name not in paired]
    tables = []
    for place, layer in enumerate(comparison.layers):
        rows = []
        for number in ordered_numbers(comparison):
            known = [comparison.difference(student, layer, number) for student in paired]
            if any(known):
                cells = [DataCell("–") if each is None else DataCell.of(each.value, each.interval, sign=True) for each in known]
                rows.append([DataCell(number.replace(" - ", " − ")), *cells])
        if rows:
            columns = ("Score", *(f"{name} − {first}" for name in paired))
            tables.append(DataTable(f"differences-{place}", f"Students minus {first} at {layer}", columns, rows, _without(without, first)))
    return tables


def _without(names: Sequence[str], first: str) -> str:
    """A sentence about the students that the tables of differences leave out; "" for none."""
    if not names:
        return ""
    runs = f"the run of {names[0]} does" if len(names) == 1 else f"the runs of {', '.join(names)} do"
    return f"Left out: {runs} not have the same images in the same random parts as the run of {first}."


def _cell(entry: Entry | None, sign: bool) -> DataCell:
    if entry is None or not entry.known:
        return DataCell("–")
    return DataCell.of(entry.value, entry.interval, sign=sign)


def drawings(comparison: Comparison) -> list[Drawing]:
    """One mark per student and layer for each of the main scores, and one for the base where all students have the same base."""
    from markupsafe import Markup

    result = []
    for prefix, title, number, base_number, from_zero in _DRAWN:
        if number not in comparison.numbers:
            continue
        series = [_series(name, place) for place, name in enumerate(comparison.names)]
        points = {layer: {name: _point(comparison.entry(name, layer, number)) for name in comparison.names} for layer in comparison.layers}
        if base_number is not None and comparison.same_base and base_number in comparison.numbers:
            # Not the base's own colour, which is that of the second student.
            base = Series("", f"base: {base_number}", "muted", "s", filled=False)
            series.append(base)
            for layer, known in points.items():
                known[base.score] = _point(comparison.entry(comparison.names[0], layer, base_number))
        svg = Markup(plots.plot(points, series, f"compared-{prefix}", from_zero=from_zero))  # matplotlib has escaped the names
        symbol = number.replace(" - ", " − ")
        result.append(Drawing(f"{title}: {symbol}", series, svg, zero=plots.limits(points, series, from_zero)[0] <= 0))
    return result


def _series(name: str, place: int) -> Series:
    """Students differ in colour; from the seventh on they also differ in marker, and from the nineteenth on in filling."""
    cycle = place // len(LINES)
    return Series(name, name, LINES[place % len(LINES)], _MARKERS[cycle % len(_MARKERS)], filled=cycle < len(_MARKERS))


def _point(entry: Entry | None) -> tuple[float, tuple[float, float]]:
    known = entry or _UNKNOWN
    return known.value, known.interval
