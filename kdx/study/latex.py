"""The LaTeX table of a study: one tabular per data set and chain of networks, with methods in rows and layers in columns."""

from __future__ import annotations

from collections.abc import Iterator

from kdx.errors import printable
from kdx.roles import BALANCE, CONTRASTS, GAIN, LIKENESS, contrast_name
from kdx.runs.number_text import number
from kdx.runs.score_tables import latex_cell, latex_score, latex_text
from kdx.study.statistics import ACCURACY, Estimate, Group, StudyStatistics
from kdx.study.table import Study

SHOWN = ("FSS(S,T)", "FSS(B,T)", LIKENESS, "RS(S)", "RS(B)", GAIN, "RS(S|B)", "RS(B|S)", BALANCE)
"""The scores of the table, as far as the networks have them."""

_SIGNED = {contrast_name(*pair) for pair in CONTRASTS}


def latex_table(study: Study, statistics: StudyStatistics, digits: int = 3) -> str:
    """The means over seeds with their intervals as LaTeX, for the package booktabs. Names are escaped.

    statistics: of the study (`kdx.study.statistics.study_statistics`).
    """
    fewest, most = statistics.seeds
    level = f"{100 * statistics.confidence:.4g}%"
    if most > 1:
        basis = f"means over {f'{fewest} to ' if fewest < most else ''}{most} seeds with {level} intervals over seeds"
    else:
        basis = f"one seed, with {level} intervals over images, which do not include the spread over seeds"
    lines = [f"% kdx {study.plan['kdx']}: {basis}. Needs \\usepackage{{booktabs}}."]
    chains = dict.fromkeys((group.data, group.chain) for group in statistics.groups)
    for data, chain in chains:
        groups = [group for group in statistics.groups if (group.data, group.chain) == (data, chain)]
        lines += ["", f"% {' '.join(printable(data).split())}: {chain.replace('→', '->')}", *_tabular(statistics, groups, digits)]
    return "\n".join([*lines, ""])


def _tabular(statistics: StudyStatistics, groups: list[Group], digits: int) -> Iterator[str]:
    """The tabular of groups that differ only in the method."""
    layers = list(dict.fromkeys(layer for group in groups for layer in statistics.layers(group)))
    count = len(layers)
    yield rf"\begin{{tabular}}{{l{'r' * count}}}"
    yield r"\toprule"
    yield " & ".join(["", *(rf"\texttt{{{latex_text(layer)}}}" for layer in layers)]).strip() + r" \\"
    yield r"\midrule"
    yield rf"\multicolumn{{{count + 1}}}{{l}}{{accuracy of the student}} \\"
    for group in groups:
        yield rf"\quad {latex_text(group.method)} & \multicolumn{{{count}}}{{c}}{{{_cell(statistics, group, '', ACCURACY, digits)}}} \\"
    for score in SHOWN:
        if not any((layer, score) in statistics.estimates[group] for group in groups for layer in layers):
            continue
        yield r"\midrule"
        yield rf"\multicolumn{{{count + 1}}}{{l}}{{{latex_score(score)}}} \\"
        for group in groups:
            cells = [_cell(statistics, group, layer, score, digits) for layer in layers]
            yield rf"\quad {latex_text(group.method)} & {' & '.join(cells)} \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _cell(statistics: StudyStatistics, group: Group, layer: str, score: str, digits: int) -> str:
    estimate: Estimate | None = statistics.estimates[group].get((layer, score))
    if estimate is None:
        return "--"
    low, high = estimate.interval
    return latex_cell((number(estimate.value, digits, score in _SIGNED), number(low, digits), number(high, digits)))
