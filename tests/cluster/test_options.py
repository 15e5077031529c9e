"""Options of clusters that would have no effect, and the threads of their workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kdx import threads
from tests import command_line as commands


@pytest.mark.parametrize(
    ("arguments", "processes", "problem"),
    [
        (["explain", "digits", "--out", "run", "--cpus-per-worker", "2"], 1, "describe the workers of a cluster"),
        (["study", "--preset", "digits", "--workers-per-gpu", "2"], 1, "describe the workers of a cluster"),
        (["study", "--preset", "digits", "--cluster", "--workers", "2"], 1, "as many workers as the cluster"),
        (["explain", "digits", "--out", "run", "--cluster"], 2, "would both distribute"),
    ],
)
def test_the_command_refuses_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    processes: int,
    problem: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    status, out, err = commands.in_folder(tmp_path, monkeypatch, capsys)(*arguments)
    assert status == 2 and problem in err and "Traceback" not in out + err


def test_the_limit_of_a_container_is_no_choice_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster would have one worker with all cores."""
    environment = {name: value for name, value in os.environ.items() if name not in threads.COUNTS}
    monkeypatch.setattr(threads, "_limit", None)
    monkeypatch.setattr(os, "environ", environment)
    threads.set_environment(environment, 8)
    assert environment["OMP_NUM_THREADS"] == "8" and threads.chosen() is None
    environment["OMP_NUM_THREADS"] = "2"
    assert threads.chosen() == 2
