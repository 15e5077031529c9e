"""The page of several students: one self-contained HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kdx.disk import write_atomic
from kdx.maps import overlays
from kdx.report import wording
from kdx.report.comparison import Comparison, compare_runs
from kdx.report.comparison_gallery import ComparedGallery, make_compared_gallery
from kdx.report.comparison_tables import difference_tables, drawings, score_tables, students_table
from kdx.report.gallery import LEAST_STABILITY, MAP_SCRIPTS, colour_tables, gradient
from kdx.report.layout import render, script_json

if TYPE_CHECKING:
    from markupsafe import Markup


def write_comparison(folders: Mapping[str, Path], target: Path) -> Path:
    """Write the page that compares the runs of several students, by the student's name, and return its path.

    The page shows the accuracies and scores of all students, and the same images with the maps of all students on one scale of colours.
    It is read from the runs' folders, contains everything that it shows and sends no request. Raises KdxError as
    `kdx.report.comparison.compare_runs` does, and where ``target`` cannot be written.
    """
    comparison = compare_runs(folders)
    write_atomic(target, _page(comparison, make_compared_gallery(comparison)).encode("utf-8", "replace"))
    return target


def _page(comparison: Comparison, gallery: ComparedGallery) -> str:
    first = comparison.first
    return render(
        "comparison.html.j2",
        styles=("gallery.css",),
        scripts=(*MAP_SCRIPTS, "comparison.js"),
        of_target=partial(wording.of_target, target=first.target_file) if first.target_file else str,
        kdx=version("kdx"),
        title=f"{first.data}, {first.split}" if first.split else first.data,
        students=comparison.names,
        notes=comparison.notes,
        images=len(comparison.images),
        confidence=wording.percent(first.confidence, 0),
        table=students_table(comparison),
        drawings=drawings(comparison),
        tables=score_tables(comparison),
        differences=difference_tables(comparison),
        layers=list(comparison.layers),
        least_stability=LEAST_STABILITY,
        gallery=gallery,
        gradients={signed: gradient(signed) for signed in (True, False)},
        opacity=round(100 * overlays.OPACITY),
        payload=_payload(comparison, gallery),
        runs=[(name, run.folder, shlex.join(run.command)) for name, run in comparison.runs.items()],
    )


def _payload(comparison: Comparison, gallery: ComparedGallery) -> Markup:
    """What the script draws the maps from."""
    return script_json(
        {
            "colours": colour_tables(),
            "layers": list(comparison.layers),
            "opening": gallery.opening,
            "strip": gallery.strip,
            "stripStudents": gallery.strip_students,
            "kinds": [{"label": kind.label, "meaning": kind.meaning, "signed": kind.signed} for kind in gallery.kinds],
            "kind": gallery.kinds.index(gallery.first_kind),
            "students": comparison.names,
            "limits": gallery.limits,
            "predictions": [
                [[known.class_name, known.right, wording.percent(known.confidence, 0)] for known in image.predictions]
                for image in gallery.images
            ],
            "maps": [image.maps for image in gallery.images],
            "figures": [image.figures for image in gallery.images],
        }
    )
