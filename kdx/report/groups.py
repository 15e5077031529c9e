"""The scores of single classes and groups on the page of a run: a plot and a table per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdx.report import wording
from kdx.report.drawing import INK, WIDTH, as_svg, elided, page_colour, page_figure, style_axes
from kdx.report.layout import DataCell, DataTable
from kdx.roles import BALANCE, LEAD, SCORES
from kdx.runs.measured import Entry, GroupEntries
from kdx.runs.record import RunRecord
from kdx.runs.score_tables import main_scores

if TYPE_CHECKING:
    from markupsafe import Markup

_ROW, _FEW_ROWS = 15, 30
"""The height of a row in points, where there are few; more rows are lower."""

_LOW_ROW, _AXIS, _MARGIN = 11, 34, 14

_NAME_LENGTH = 18


@dataclass(frozen=True)
class LayerGroups:
    """A layer: its plot, its table, and whether it is shown first."""

    layer: str
    svg: Markup
    table: DataTable
    opening: bool


@dataclass(frozen=True)
class GroupSection:
    """The scores of the classes or groups of a run. kind: ``class`` or ``group``. plotted: the name of the score in the plots, with a true
    minus sign, and its meaning. tested: whether it has p-values, and note: what they show. left_out: why there are no scores, or "".
    """

    kind: str
    plotted: str
    meaning: str
    tested: bool
    layers: list[LayerGroups]
    left_out: str
    note: str = ""


def group_sections(run: RunRecord, opening: str) -> list[GroupSection]:
    """The sections "By class" and "By group", those of them that the run has scores for, or a reason not to have them.

    opening: the layer that is shown first.
    """
    sections = []
    for kind, key, layers in (("class", "classes", run.class_scores), ("group", "groups", run.group_scores)):
        known = {layer: groups for layer, groups in layers.items() if groups}
        if known:
            sections.append(_section(run, kind, known, opening if opening in known else next(iter(known))))
        elif key in run.left_out:
            sections.append(GroupSection(kind, "", "", False, [], run.left_out[key]))
    return sections


def _section(run: RunRecord, kind: str, layers: Mapping[str, Mapping[str, GroupEntries]], opening: str) -> GroupSection:
    from markupsafe import Markup

    names = main_scores(run)
    plotted = next((name for name in (BALANCE, LEAD) if name in names), names[0])
    shown = []
    for place, (layer, groups) in enumerate(layers.items()):
        svg = Markup(group_plot(groups, plotted, f"{kind}-{place}", run.confidence))  # matplotlib has escaped the names
        shown.append(LayerGroups(layer, svg, _table(run, kind, place, layer, groups, names), layer == opening))
    meaning = SCORES[plotted].label if plotted in SCORES else ""
    note = _tested_note(kind, len(next(iter(layers.values()))), len(layers), run.confidence)
    return GroupSection(kind, plotted.replace(" - ", " − "), meaning, plotted not in SCORES, shown, "", note)


def _table(run: RunRecord, kind: str, place: int, layer: str, groups: Mapping[str, GroupEntries], names: Sequence[str]) -> DataTable:
    heading = kind.capitalize() if kind == "class" or run.group_column is None else run.group_column
    rows = [
        [DataCell(group), DataCell(f"{values.n:,}", value=values.n), *(_cell(values.entries.get(name), name) for name in names)]
        for group, values in groups.items()
    ]
    reasons: dict[str, int] = {}
    for values in groups.values():
        for reason in set(values.missing.values()):
            reasons[reason] = reasons.get(reason, 0) + 1
    notes = [
        f"{reason} ({count:,} {kind if count == 1 else 'classes' if kind == 'class' else 'groups'})" for reason, count in reasons.items()
    ]
    note = f"A dash stands for a score without a value: {' '.join(notes)}" if notes else ""
    columns = [heading, "Images", *(name.replace(" - ", " − ") for name in names)]
    return DataTable(f"by-{kind}-{place}", f"Scores per {kind} at {layer}", columns, rows, note, sortable=True)


def _cell(entry: Entry | None, name: str) -> DataCell:
    return DataCell("–") if entry is None or not entry.known else DataCell.of(entry.value, entry.interval, sign=" - " in name)


def group_plot(groups: Mapping[str, GroupEntries], name: str, prefix: str, confidence: float) -> str:
    """One score as inline SVG: a row per class or group with a mark and a bar for its interval, the highest value first.

    A difference whose adjusted p-value is at most 1 - confidence has a filled mark in the colour of the network that it favours; other
    differences are hollow. A group without a value is not drawn. The drawing is the same byte for byte for the same numbers.
    """
    known = [(group, entry) for group, values in groups.items() if (entry := values.entries.get(name)) is not None and entry.known]
    known.sort(key=lambda pair: -pair[1].value)  # equal values keep their order
    row = _ROW if len(known) <= _FEW_ROWS else _LOW_ROW
    names = [elided(group, _NAME_LENGTH) for group, _ in known]
    left = _MARGIN + 6.2 * (row / _ROW) ** 0.5 * max((len(text) for text in names), default=1)
    height = max(1, len(known)) * row + _AXIS + 4
    with page_figure(height) as figure:
        axes = figure.add_axes((left / WIDTH, 4 / height, 1 - (left + _MARGIN) / WIDTH, 1 - (_AXIS + 4) / height))
        ends = [x for _, entry in known for x in entry.interval]
        low, high = min(0.0, *ends, 0.0), max(0.0, *ends, 0.0)
        pad = 0.04 * (high - low) or 0.1
        axes.set(xlim=(low - pad, high + pad), ylim=(len(known) - 0.5, -0.5))
        style_axes(axes, grid="x", label_size=10)
        axes.locator_params(axis="x", nbins=5)
        axes.axvline(0, color=INK, alpha=0.5, linewidth=1)
        for place, (_, entry) in enumerate(known):
            colour, filled = _mark(entry, name, confidence)
            axes.plot(entry.interval, (place, place), color=colour, linewidth=1.6, solid_capstyle="butt")
            face = colour if filled else page_colour("surface")
            axes.plot(entry.value, place, "o", color=colour, markerfacecolor=face, markersize=5 if row == _ROW else 4, mew=1.3)
        axes.set_yticks(range(len(names)), names, fontsize=10 if row == _ROW else 8, parse_math=False)
        axes.xaxis.tick_top()  # a long plot scrolls inside its frame, which opens at the top
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(name.replace(" - ", " − "), color=INK, fontsize=10, labelpad=3, parse_math=False)
        return as_svg(figure, prefix)


def _mark(entry: Entry, name: str, confidence: float) -> tuple[str, bool]:
    """The colour of a mark, and whether it is filled."""
    if name in SCORES:
        return page_colour("student"), True
    settled = entry.p_adjusted is not None and entry.p_adjusted <= 1 - confidence
    other = "teacher" if name == LEAD else "base"
    return page_colour(("student" if entry.value > 0 else other) if settled else "muted"), settled


def _tested_note(kind: str, count: int, layers: int, confidence: float) -> str:
    """What a filled mark means, in words."""
    over = f"all {count:,} {'classes' if kind == 'class' else 'groups'}" + (f" and {layers} layers" if layers > 1 else "")
    level = wording.percent(1 - confidence, 0)
    return f"A filled mark means that the difference is not zero at the level of {level}, adjusted by Holm’s method over {over}."
