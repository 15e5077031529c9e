"""Options of clusters that would have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

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
