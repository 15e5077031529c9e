"""A study tries a batch of every kind of training before it trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from kdx.commands import study
from kdx.errors import KdxError
from kdx.study import rehearsal
from kdx.study.design import design_of
from kdx.study.grid import grid_of
from tests.study.small_study import ASSISTANT, CONTENT

LOSSES = "tests.distill.test_student_loss"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"methods": ["kd", f"{LOSSES}:failing"]}, f"The method {LOSSES}:failing: The distillation of kdx:.*fails with IndexError"),
        ({"methods": {"wild": "kd:1e300"}}, "The method wild: .*The loss kd is inf for the first images, before any training"),
        ({"methods": ["at"], "layers": ["layer1=fc"]}, r"features are \[2, 8, 8\] in the student and \[10, 1, 1\] in the teacher"),
        (
            {"methods": ["catkd"], "assistants": {"medium": ASSISTANT}, "layers": ["layer1"]},
            "The method catkd: .*no linear classifier from the 2 channels of layer 'layer1'",
        ),
    ],
)
def test_a_training_that_cannot_work_is_an_error_before_anything_is_trained(entries: dict[str, Any], problem: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KdxError, match=problem):
        study.dry_run(design_of({**copy.deepcopy(CONTENT), **entries}), out)
    assert not out.exists()
    with pytest.raises(KdxError, match=problem):
        study.run(design_of({**copy.deepcopy(CONTENT), **entries}), out, workers=1, announce=lambda line: None)
    assert [path.name for path in out.iterdir()] == [".lock"]  # so that the corrected study can have this folder


def test_only_trainings_that_are_not_complete_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    design = design_of({**copy.deepcopy(CONTENT), "seeds": 2})
    grid, tried = grid_of(design), []
    monkeypatch.setattr(rehearsal, "rehearse_chain", lambda data, references, settings, *_: tried.append(settings.method))
    for complete, expected in (
        (set(), ["at", "kd"]),
        ({job.key for job in grid.jobs if not job.key.endswith("/at/seed1")}, ["at"]),
        ({job.key for job in grid.jobs}, []),
    ):
        tried.clear()
        rehearsal.rehearse(design, grid.cells, grid.jobs, complete)
        assert tried == expected
