"""The jobs of a study in workers of a real Ray: the same order and the same failures as in local processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from kdx.cluster.options import ClusterOptions
from kdx.commands import study
from kdx.study.attempts import ERROR_FILE
from kdx.study.design import design_of
from kdx.study.grid import grid_of
from kdx.study.schedule import run_jobs
from tests.cluster.test_ray import limited as limited
from tests.cluster.test_ray import ray as ray
from tests.distill.conftest import one_thread as one_thread
from tests.study.small_study import ASSISTANT, CONTENT, fail_at


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_failures_end_only_the_jobs_that_need_them_and_jobs_of_killed_workers_are_repeated(tmp_path: Path) -> None:
    grid = grid_of(design_of({**copy.deepcopy(CONTENT), "methods": ["kd", "at", "rkd", "dkd"], "assistants": {"medium": ASSISTANT}}))
    notes: list[str] = []
    settings: dict[str, Any] = {"workers": 1, "threads": 1, "cluster": ClusterOptions(workers=2)}
    ended = list(run_jobs(grid.jobs, fail_at, tmp_path, on_note=lambda job, note: notes.append(note), **settings))
    assert sorted(outcome.job.key for outcome in ended) == sorted(job.key for job in grid.jobs)
    problems = {outcome.job.key: outcome.problem for outcome in ended if outcome.problem}
    assert problems["digits/seed0/assistant-large+medium-kd"] == "The assistant is ill."
    assert "digits/seed0/assistant-large+medium-kd, which failed" in problems["digits/large+medium/tiny/kd/seed0"]
    assert "ZeroDivisionError" in problems["digits/large/tiny/at/seed0"]
    assert "fail_at" in (tmp_path / "cells/digits/large/tiny/at/seed0" / ERROR_FILE).read_text()
    assert "worker ended" in problems["digits/large/tiny/rkd/seed0"] and "digits/large/tiny/dkd/seed0" not in problems
    assert len([note for note in notes if note.startswith("Warning")]) == 3, "the job of dkd is repeated once, and that of rkd twice"
    done = (tmp_path / "jobs.txt").read_text().split()
    assert sorted(done) == sorted(job.key for job in grid.jobs if job.key not in problems), "every other job ran, once"


def numbers_and_weights(study: Path) -> dict[str, bytes]:
    """The tables of a study and the weights of its networks."""
    files = [*study.glob("study.csv"), *study.glob("study.tex"), *study.rglob("*.safetensors")]
    return {path.relative_to(study).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.usefixtures("ray", "one_thread")
def test_trainings_in_a_cluster_give_the_weights_and_the_tables_of_local_processes(tmp_path: Path) -> None:
    training = {"epochs": 2, "image_size": 8}
    design = design_of({**copy.deepcopy(CONTENT), "methods": ["kd"], "assistants": {"medium": ASSISTANT}, "training": training})
    study.run(design, tmp_path / "local", workers=2, announce=lambda line: None)
    study.run(design, tmp_path / "cluster", cluster=ClusterOptions(workers=2, cpus_per_worker=1), announce=lambda line: None)
    local = numbers_and_weights(tmp_path / "local")
    assert {Path(name).stem for name in local} >= {"study", "teacher", "base", "student"}
    assert numbers_and_weights(tmp_path / "cluster") == local
