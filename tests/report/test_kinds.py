"""Which maps the page shows, at which layer it opens, and what it states about the maps of each layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdx.report.gallery import make_gallery
from kdx.report.kinds import kinds_left_out, opening_layer, page_kinds, shown_first
from kdx.report.map_facts import layer_facts, map_sum
from kdx.report.page import write_page
from kdx.runs.record import read_run
from tests.made_runs import edit, entry, make_run

GRIDS = {"layer1": (16, 16), "layer2": (8, 8), "layer3": (8, 8)}


def test_the_first_map_is_of_what_the_student_has_and_the_base_does_not(run: Path, tmp_path: Path) -> None:
    record = read_run(run)
    kinds = page_kinds(record)
    assert kinds[0].name == "rs_student_minus_base" and kinds[0].label == "RS(S) − RS(B)"
    assert {kind.name for kind in kinds} | set(kinds_left_out(record)) == set(record.map_kinds)
    assert set(kinds_left_out(record)) == {
        "rs_student_minus_teacher", "rs_teacher",
        "rs_base_given_student", "rs_teacher_given_student", "rs_student_given_teacher", "fss_teacher",
    }  # fmt: skip
    old = page_kinds(read_run(make_run(tmp_path / "old", gallery=0, score_maps=False)))
    assert [kind.name for kind in old] == ["distilled", "residual", "missed", "new"] and shown_first(record, old) == old


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({}, "layer1"),  # all pass, and the first has the finest grid
        ({"layers__layer1__contrasts__RS(S) - RS(B)": entry(0.05, 0.06, None)}, "layer3"),  # the last of two equal grids
        ({"layers__layer1__maps__rs_student_minus_base__above_null": 0.08}, "layer3"),
        pytest.param(  # none passes
            {f"layers__layer{i}__maps__rs_student_minus_base__above_null": 0.04 for i in (1, 2, 3)}, "layer1", marks=pytest.mark.slow
        ),
        ({f"layers__layer{i}__maps__rs_student_minus_base__above_null": 0.04 for i in (1, 3)}, "layer2"),
    ],
)
def test_the_page_opens_on_the_finest_grid_that_passes_its_null(tmp_path: Path, changes: dict[str, object], layer: str) -> None:
    folder = make_run(tmp_path / "run", gallery=0, layers={name: name for name in GRIDS})
    edit(folder / "scores.json", **changes)
    record = read_run(folder)
    assert opening_layer(record, page_kinds(record)[0], GRIDS) == layer


def test_the_printed_sum_of_the_maps_equals_the_printed_score(run: Path) -> None:
    record = read_run(run)
    kinds = page_kinds(record)
    gallery = make_gallery(record)
    for facts in layer_facts(record, kinds, gallery.grids):
        for kind in facts.kinds:
            assert kind.total == kind.score and bool(kind.total) == kind.kind.signed
        entry_ = record.contrasts[facts.layer]["RS(S) - RS(B)"]
        assert map_sum(record, facts.layer, kinds[0]) == pytest.approx(entry_.value, abs=1e-6)
        assert facts.notes[0].startswith(f"The maps of all 40 images add up to {entry_.value:.3f}; the score RS(S) − RS(B) is ")
    page = (run / "report.html").read_text()
    assert "The maps of all 40 images add up to 0.050; the score RS(S) − RS(B) is 0.050 (0.010 to 0.090)." in page


def test_coarse_grids_empty_maps_and_maps_by_chance_are_stated(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=4, sides=(4, 2))
    maps = "layers__layer3__maps"
    edit(
        folder / "scores.json", **{f"{maps}__distilled__empty": 0.31, f"{maps}__residual__empty": 0.1, f"{maps}__rs_base__above_null": 0.03}
    )
    edit(folder / "scores.json", **{f"layers__layer1__maps__{kind}__empty": 0.0 for kind in ("distilled", "residual", "missed", "new")})
    edit(folder / "scores.json", **{f"{maps}__{kind}__empty": 0.0 for kind in ("missed", "new")})
    record = read_run(folder)
    fine, coarse = layer_facts(record, page_kinds(record), make_gallery(record).grids)
    assert fine.grid == "4 × 4" and fine.warnings == []
    assert coarse.warnings == [
        "A map of layer3 has 2 × 2 cells, so it localises little.",
        "Empty maps, which are zero everywhere, at layer3: 31% (distilled).",
        "No stronger than maps by chance at layer3: RS(B).",
    ]
    page = write_page(folder).read_text()
    assert all(page.count(warning) == 1 for warning in coarse.warnings)
    assert '<span class="grid">(2 × 2)</span>' in page
