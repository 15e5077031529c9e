"""The page of a study: one HTML file from the study's folder, with links to the pages of its runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdx.disk import remove_leftovers, write_atomic
from kdx.report.gallery import gradient
from kdx.report.layout import nested_facts, render, script_json
from kdx.report.wording import percent
from kdx.runs import schema
from kdx.runs.record import RunRecord, read_run
from kdx.runs.training_scores import TrainingScores, read_training_scores
from kdx.study import drawings, page_tables
from kdx.study.figures import MOST_ROWS
from kdx.study.side_by_side import side_by_side
from kdx.study.statistics import POWER, Group, StudyStatistics, detectable, study_statistics
from kdx.study.table import Cell, Study, read_study

_FEW_SEEDS = 5
"""With fewer seeds than this, the page warns that differences have to be large to be found."""

_CONFIDENCE = 0.95
"""Of a study without complete cells."""


def write_page(folder: Path) -> Path:
    """Write ``report.html`` of the study in ``folder`` from its files and its complete runs; return its path.

    The page shows what is complete, and names what is missing or failed. It is the same byte for byte for the same files. It is written
    under a temporary name and renamed. Raises KdxError where there is no study or a newer kdx wrote it, and LostResult where a file of a
    complete run is missing or damaged.
    """
    folder = Path(folder)
    study = read_study(folder)
    remove_leftovers(folder)
    target = folder / schema.PAGE
    write_atomic(target, _page(folder, study).encode("utf-8", "replace"))
    return target


def _page(folder: Path, study: Study) -> str:
    measured = {measurement.cell for measurement in study.measurements}
    cells = [cell for cell in study.cells if cell.key in measured]
    runs = {cell.key: read_run(folder / cell.folder) for cell in cells}
    parameters = _teacher_parameters(cells, runs)
    confidence = next((run.confidence for run in runs.values()), _CONFIDENCE)
    statistics = study_statistics(study, parameters, confidence)
    data = list(dict.fromkeys(group.data for group in statistics.groups)) or list(dict.fromkeys(cell.data for cell in study.cells))
    payload = side_by_side(cells, runs)
    rows = max(map(len, drawings.families(statistics).values()), default=0)
    return render(
        "study.html.j2",
        folder=Path(__file__).parent / "templates",
        styles=("statements.css", "gallery.css", "study.css"),
        scripts=("maps.js", "study.js"),
        kdx=str(study.plan.get("kdx", "")),
        data=data,
        heading=_heading(study),
        notices=[*_notices(study, statistics)],
        basis=_basis(statistics, runs),
        statistics=statistics,
        claims=page_tables.claim_counts(statistics),
        correction=_correction(statistics),
        intervals=_intervals(statistics),
        forests=drawings.forest_drawings(statistics, ("likeness", "balance")),
        tests=page_tables.tests_table(statistics, several_data=len(data) > 1),
        score_figures=[*drawings.accuracy_drawings(statistics), *drawings.score_drawings(statistics)],
        rows_left_out=MOST_ROWS if rows > MOST_ROWS else 0,
        score_tables=[table(statistics, name) for name in data for table in (page_tables.accuracy_table, page_tables.scores_table)],
        assistants=any(group.assistants for group in statistics.groups),
        own_teacher=page_tables.OWN_TEACHER,
        capacity=drawings.capacity_drawings(statistics, parameters),
        capacity_forests=drawings.forest_drawings(statistics, ("capacity", "assistant")),
        method_forests=drawings.forest_drawings(statistics, ("methods",)),
        methods=page_tables.method_table(statistics),
        transfer_tables=[page_tables.transfer_table(statistics, name) for name in data],
        failures=page_tables.failures(statistics),
        payload=None if payload is None else script_json(payload),
        gradients={signed: gradient(signed) for signed in (True, False)},
        training=drawings.training_drawings(_probes(study, runs)),
        students=page_tables.cells_table(study, confidence, several_data=len(data) > 1),
        command=_command(study.plan),
        facts=[*nested_facts({name: study.plan.get(name) or {} for name in ("design", "environment")})],
    )


def _teacher_parameters(cells: Sequence[Cell], runs: Mapping[str, RunRecord]) -> dict[tuple[str, str], int]:
    """By data set and teacher. The teacher of a run with assistants is the last assistant, so these runs are left out."""
    direct = {(cell.data, cell.teacher): runs[cell.key].networks.get("teacher") for cell in cells if not cell.assistants}
    return {name: network.parameters for name, network in direct.items() if network is not None and network.parameters}


def _probes(study: Study, runs: Mapping[str, RunRecord]) -> dict[Group, list[TrainingScores]]:
    result: dict[Group, list[TrainingScores]] = {}
    for cell in study.cells:
        scores = read_training_scores(runs[cell.key].folder) if cell.key in runs else None
        if scores is not None:
            result.setdefault(Group.of(cell), []).append(scores)
    return result


def _heading(study: Study) -> str:
    groups = {Group.of(cell) for cell in study.cells}
    counts = {
        "teacher": len({group.teacher for group in groups}),
        "student": len({group.student for group in groups}),
        "method": len({group.method for group in groups}),
        "seed": len({cell.seed for cell in study.cells}),
    }
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())


def _notices(study: Study, statistics: StudyStatistics) -> Iterator[str]:
    states = [study.status[cell.key].state for cell in study.cells if cell.key in study.status]
    missing, failed = states.count("missing"), states.count("failed")
    if missing or failed:
        yield (
            f"{missing + failed} of {len(study.cells)} students are not part of this page: {missing} not computed yet, {failed} failed. "
            "Run the same command again to compute them."
        )
    if statistics.groups and statistics.seeds[1] < 2:
        yield "There is one seed, so no difference is tested. Intervals are over images and do not include the spread over trainings."


def _basis(statistics: StudyStatistics, runs: Mapping[str, RunRecord]) -> str:
    few, many = statistics.seeds
    images = sorted({run.explained for run in runs.values()})
    seeds = f"{many} {'seed' if many == 1 else 'seeds'}" if few == many else f"{few} to {many} seeds"
    count = " to ".join(f"{n:,}" for n in dict.fromkeys([images[0], images[-1]])) if images else "0"
    return f"{len(runs)} students, {seeds} per combination, measured on {count} images."


def _correction(statistics: StudyStatistics) -> str:
    tests = sum(one.p_adjusted is not None for one in statistics.comparisons)
    if not tests:
        return "There are no tests, because a test needs at least two seeds."
    few = max(2, statistics.seeds[0])
    level = percent(1 - statistics.confidence, 0)
    text = (
        f"All {tests} tests of this page are corrected together by Holm’s method: the probability of one or more false results among them "
        f"is at most {level}. Each is a two-sided t test of differences that are paired within seeds. A result counts as settled only "
        f"if its corrected p-value is at most {level}; intervals are not corrected. "
    )
    if few < _FEW_SEEDS:
        effect = f"{detectable(few, statistics.confidence):.1f} standard deviations of the seeds’ differences"
        text += (
            f"The power is small: with {few} seeds, a single uncorrected test finds a difference with {percent(POWER, 0)} probability "
            f"only if it is {effect} or more. A result that is not settled is not evidence that there is no difference. "
        )
    return text + "The tests are about trainings like these on these images, not about other data."


def _intervals(statistics: StudyStatistics) -> str:
    level = percent(statistics.confidence, 0)
    estimates = [estimate for by_name in statistics.estimates.values() for estimate in by_name.values()]
    if not any(estimate.over_seeds for estimate in estimates):
        text = f"Intervals are {level} intervals over images, within the one seed of each combination."
    else:
        text = f"Intervals are {level} intervals over seeds (Student’s t)."
        if not all(estimate.over_seeds for estimate in estimates):
            text += " “Over images” in a table marks a combination with one seed, whose interval is over images."
    return f"{text} {page_tables.OWN_TEACHER}" if any(group.assistants for group in statistics.groups) else text


def _command(plan: Mapping[str, Any]) -> str:
    command = plan.get("command") or []
    return command if isinstance(command, str) else shlex.join(map(str, command))
