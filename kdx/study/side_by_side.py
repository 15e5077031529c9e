"""The same images for all students of a study: what the page's script draws the maps from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdx.report.gallery import colour_tables, scale_end
from kdx.report.kinds import PageKind, page_kinds, shown_first
from kdx.report.packing import PackedMap, data_uri, packed_map, rounded, shrunk
from kdx.runs.gallery_choice import read_choice
from kdx.runs.record import RunRecord
from kdx.study.page_tables import page_link, student_label
from kdx.study.table import Cell

_KINDS = ("rs_student_minus_base", "fss_student_minus_base", "distilled", "residual")
"""The kinds of map on the page, where a run has them; otherwise those that the page of a run shows first."""

_DETAIL = ((12, 64), (12, 32), (12, 16), (8, 12), (6, 8), (4, 8))
"""Numbers of images, and the longest edge of a map in cells: the first that fits `_MOST_BYTES` is used."""

_MOST_BYTES = 7_000_000


@dataclass(frozen=True)
class _Students:
    """The students on one data set, the images that all of them have, and where these are in each run."""

    cells: Sequence[Cell]
    runs: Sequence[RunRecord]
    kinds: Sequence[PageKind]
    ids: Sequence[str]
    rows: Sequence[Mapping[str, int]]  # of the students' runs, by the image's id


def side_by_side(cells: Sequence[Cell], runs: Mapping[str, RunRecord]) -> dict[str, Any] | None:
    """The payload of the page's script; None where no run has pictures.

    cells: the complete ones. runs: by the key of the cell. Raises LostResult where a picture or a map is missing or damaged.
    """
    by_data = {data: [cell for cell in cells if cell.data == data] for data in dict.fromkeys(cell.data for cell in cells)}
    students = [each for group in by_data.values() if (each := _students(group, runs)).ids]
    if not students:
        return None
    images, edge = next((detail for detail in _DETAIL if _size(students, *detail) <= _MOST_BYTES), _DETAIL[-1])
    return {"colours": colour_tables(), "sets": [_set(each, images, edge) for each in students]}


def _students(cells: Sequence[Cell], runs: Mapping[str, RunRecord]) -> _Students:
    all_runs = [runs[cell.key] for cell in cells]
    rows = [dict(zip(run.samples.ids, map(int, run.samples.rows), strict=True)) for run in all_runs]
    first = all_runs[0]
    kinds = page_kinds(first)
    kinds = [kind for kind in kinds if kind.name in _KINDS] or shown_first(first, kinds)
    kinds = [kind for kind in kinds if all(kind.name in run.map_kinds for run in all_runs)]
    names = {row: name for name, row in rows[0].items()}
    _, chosen = read_choice(first)
    ids = [names[row] for row in chosen if row in names and all(names[row] in known for known in rows)]
    return _Students(cells, all_runs, kinds, ids, rows)


def _size(students: Sequence[_Students], images: int, edge: int) -> int:
    """About the number of bytes of all maps on the page."""
    total = 0
    for each in students:
        for run in each.runs:
            for layer in run.layers:
                grid = run.maps(layer, each.kinds[0].name, []).shape[1:] if each.kinds else (0, 0)
                shrink = min(1.0, edge / max(1, *grid))
                total += min(images, len(each.ids)) * len(each.kinds) * (int(4 / 3 * grid[0] * grid[1] * shrink**2) + 60)
    return total


def _set(students: _Students, images: int, edge: int) -> dict[str, Any]:
    ids, first = students.ids[:images], students.runs[0]
    positions = {name: place for place, name in enumerate(first.samples.ids)}
    layers = list(dict.fromkeys(layer for run in students.runs for layer in run.layers))
    drawn = [_maps(students, place, ids) for place in range(len(students.cells))]
    return {
        "name": students.cells[0].data,
        "images": [
            {"id": name, "label": first.class_name(int(first.samples.labels[positions[name]])), **_picture(first, students.rows[0][name])}
            for name in ids
        ],
        "layers": layers,
        "kinds": [{"name": kind.name, "label": kind.label, "meaning": kind.meaning, "signed": kind.signed} for kind in students.kinds],
        "limits": [[_limit(drawn, layer, kind.name) for kind in students.kinds] for layer in layers],
        "students": [_student(students, place, ids, layers, drawn[place], edge) for place in range(len(students.cells))],
    }


def _picture(run: RunRecord, row: int) -> dict[str, Any]:
    picture = shrunk(run.picture(row))
    return {"uri": data_uri(picture), "width": picture.width, "height": picture.height}


_Maps = Mapping[tuple[str, str], Any]
"""Maps [n, h, w] of the page's images by layer and kind."""


def _maps(students: _Students, place: int, ids: Sequence[str]) -> _Maps:
    run, rows = students.runs[place], [students.rows[place][name] for name in ids]
    return {(layer, kind.name): run.maps(layer, kind.name, rows) for layer in run.layers for kind in students.kinds}


def _limit(drawn: Sequence[_Maps], layer: str, kind: str) -> float:
    """The value at which the scale of colours ends that all students share."""
    return scale_end(maps[layer, kind] for maps in drawn if (layer, kind) in maps)


def _student(students: _Students, place: int, ids: Sequence[str], layers: Sequence[str], maps: _Maps, edge: int) -> dict[str, Any]:
    cell, run = students.cells[place], students.runs[place]
    where = {name: position for position, name in enumerate(run.samples.ids)}
    positions = [where[name] for name in ids]
    predicted, confidences = run.samples.predictions["student"], run.samples.confidences["student"]
    right = run.samples.correct("student")
    stacks = [[(maps.get((layer, kind.name)), kind) for kind in students.kinds] for layer in layers]
    drawn = [[[_map(stack, image, kind, edge) for stack, kind in of_layer] for of_layer in stacks] for image in range(len(ids))]
    return {
        "chain": " → ".join((cell.teacher, *cell.assistants)),
        "student": cell.student,
        "method": cell.method,
        "seed": cell.seed,
        "label": student_label(cell),
        "page": page_link(cell),
        "has": [layer in run.layers for layer in layers],
        "predictions": [[run.class_name(int(predicted[at])), bool(right[at]), rounded(float(confidences[at]))] for at in positions],
        "maps": drawn,
    }


def _map(stack: Any, image: int, kind: PageKind, edge: int) -> tuple[PackedMap | None, float] | None:
    """A map and its sum over all positions."""
    if stack is None:
        return None
    return packed_map(stack[image], signed=kind.signed, edge=edge), rounded(float(np.nan_to_num(stack[image].astype(np.float64)).sum()))
