"""The order of jobs, failures that end nothing else, and processes that end with the first one."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdx.study.attempts import ERROR_FILE, Note, Outcome
from kdx.study.design import design_of
from kdx.study.grid import Grid, Job, grid_of
from kdx.study.schedule import run_jobs
from kdx.study.workers import Workers
from tests.study.small_study import ASSISTANT, CONTENT, fail_at, record


@pytest.fixture(scope="module")
def grid() -> Grid:
    return grid_of(design_of({**copy.deepcopy(CONTENT), "assistants": {"medium": ASSISTANT}}))


def outcomes(
    grid: Grid, perform: Any, folder: Path, workers: int, on_note: Callable[[Job, str], None] = lambda job, note: None, **settings: Any
) -> dict[str, Outcome]:
    ended = list(run_jobs(grid.jobs, perform, folder, workers=workers, threads=1, on_note=on_note, **settings))
    assert len({outcome.job.key for outcome in ended}) == len(ended)
    return {outcome.job.key: outcome for outcome in ended}


def test_every_job_runs_once_after_those_that_it_needs(grid: Grid, tmp_path: Path) -> None:
    ended = outcomes(grid, record, tmp_path, 1)
    assert not any(outcome.problem for outcome in ended.values())
    assert sorted((tmp_path / "jobs.txt").read_text().split()) == sorted(job.key for job in grid.jobs)


def test_complete_jobs_do_not_run_again(grid: Grid, tmp_path: Path) -> None:
    complete = {job.key for job in grid.jobs if job.kind != "cell"}
    (tmp_path / "jobs.txt").write_text("\n".join(complete) + "\n")
    assert set(outcomes(grid, record, tmp_path, 1, complete=complete)) == {job.key for job in grid.jobs} - complete


def check_failures(ended: dict[str, Outcome], folder: Path) -> None:
    problems = {key: outcome.problem for key, outcome in ended.items() if outcome.problem}
    assert problems.pop("digits/seed0/assistant-large+medium-kd") == "The assistant is ill."
    assert problems.pop("digits/seed0/assistant-large+medium-at") == "The assistant is ill."
    assert "digits/seed0/assistant-large+medium-kd, which failed" in problems.pop("digits/large+medium/tiny/kd/seed0")
    assert "ZeroDivisionError: nothing can be divided" in problems.pop("digits/large/tiny/at/seed0")
    assert "fail_at" in (folder / "cells/digits/large/tiny/at/seed0" / ERROR_FILE).read_text()
    assert not ended["digits/large/tiny/kd/seed0"].problem


def test_a_failure_ends_only_the_jobs_that_need_it(grid: Grid, tmp_path: Path) -> None:
    ended = outcomes(grid, fail_at, tmp_path, 1)
    check_failures(ended, tmp_path)
    assert len(ended) == len(grid.jobs)


def test_code_of_a_model_that_ends_the_program_fails_its_job_alone(grid: Grid, tmp_path: Path) -> None:
    def leave(job: Job, folder: Path, note: Note) -> None:
        if job.key == "digits/large/tiny/at/seed0":
            sys.exit(3)
        record(job, folder, note)

    ended = outcomes(grid, leave, tmp_path, 1)
    assert {key for key, outcome in ended.items() if outcome.problem} == {"digits/large/tiny/at/seed0"}
    assert "SystemExit: 3" in ended["digits/large/tiny/at/seed0"].problem and len(ended) == len(grid.jobs)


@pytest.mark.slow  # two processes import PyTorch
def test_processes_do_the_same_and_jobs_whose_process_dies_are_repeated(tmp_path: Path) -> None:
    content = {**copy.deepcopy(CONTENT), "assistants": {"medium": ASSISTANT}, "methods": ["rkd", "dkd", "kd", "at"]}
    grid = grid_of(design_of(content))
    warnings: list[str] = []
    ended = outcomes(grid, fail_at, tmp_path, 2, lambda job, note: warnings.append(job.key) if note.startswith("Warning") else None)
    assert sorted(warnings) == ["digits/large/tiny/dkd/seed0"] + 2 * ["digits/large/tiny/rkd/seed0"]
    assert not ended["digits/large/tiny/dkd/seed0"].problem
    assert "ended by signal 9" in ended["digits/large/tiny/rkd/seed0"].problem
    check_failures(ended, tmp_path)
    assert len(ended) == len(grid.jobs)


@pytest.mark.slow  # two processes import PyTorch
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_process_that_dies_without_a_job_is_replaced(grid: Grid, tmp_path: Path) -> None:
    with Workers(1, record, tmp_path, 1) as pool:
        pool.start(grid.jobs[0])
        assert [outcome.problem for outcome in pool.wait(lambda job, note: None)] == [""]
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        pool.start(grid.jobs[1])
        assert [outcome.problem for outcome in pool.wait(lambda job, note: None)] == [""]


@pytest.mark.slow  # a process imports PyTorch
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_left_to_the_first_process_while_others_start(grid: Grid, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal sends it to all processes."""
    with Workers(1, record, tmp_path, 1) as pool:
        pool.start(grid.jobs[0])
        (process,) = multiprocessing.active_children()
        for _ in range(20):
            os.kill(process.pid or 0, signal.SIGINT)
            time.sleep(0.05)
        assert [outcome.problem for outcome in pool.wait(lambda job, note: None)] == [""]
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_processes_end_with_the_first_one(tmp_path: Path) -> None:
    """The script has no ``if __name__ == "__main__"``, and is not run again by the processes."""
    code = (
        "import sys; from pathlib import Path; from kdx.study.design import design_of; from kdx.study.grid import grid_of\n"
        "from kdx.study.schedule import run_jobs; from tests.study.small_study import CONTENT, sleep\n"
        "list(run_jobs(grid_of(design_of(CONTENT)).jobs, sleep, Path(sys.argv[1]), workers=2, threads=1, on_note=print))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        wait_for(lambda: len(list(tmp_path.glob("process-*"))) == 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    numbers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("process-*")]
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in numbers))


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
