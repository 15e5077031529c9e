"""A full or read-only disk, a folder that vanishes, a clock that goes back, two processes: the error is clear, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdx.disk import check_locked, lock_folder
from kdx.errors import KdxError
from tests.command_line import in_folder
from tests.hostile.cases import Subject, contents, differences, problems_of
from tests.hostile.forked import Fault
from tests.hostile.test_death import points


def restore(run: Subject) -> None:
    """Restore the folder that has vanished."""
    if (run.folder / "run.gone").exists():
        shutil.rmtree(run.folder / "run", ignore_errors=True)
        (run.folder / "run.gone").rename(run.folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "visited"), [("explain, batch", 3), ("explain, whole", 2), ("distill", 3), ("study", 1), ("export", 1)])
@pytest.mark.parametrize("fault", [Fault.FULL, Fault.READ_ONLY, Fault.VANISHED], ids=str)
def test_a_disk_that_fails(subject: Callable[[str], Subject], case: str, visited: int, fault: Fault) -> None:
    run = subject(case)
    ending = run.run()
    expected, problems = contents(run.folder / "run"), []
    for point in points(ending.calls, visited):
        run.clear()
        ending = run.run(fault, point)
        wrong = problems_of(ending)
        if ending.status == 0 and fault is Fault.VANISHED and (run.folder / "run").exists():
            wrong = [f"success without {different}" for different in differences(contents(run.folder / "run"), expected)]
        restore(run)
        again = run.run()
        wrong += [again.output] if again.status else differences(contents(run.folder / "run"), expected)
        problems += [(point, ending.output[-300:], wrong)] if wrong else []
    assert not problems


@pytest.mark.slow
@pytest.mark.parametrize("case", ["explain, batch", "distill"])
def test_a_folder_that_vanishes_at_any_moment(subject: Callable[[str], Subject], case: str) -> None:
    """No command reports success in a new folder that lacks the files of the old one."""
    run, moments = subject(case), random.Random(1)
    seconds = run.run().seconds
    expected = contents(run.folder / "run")
    for _ in range(4):
        run.clear()
        ending = run.run(vanish_after=moments.uniform(0.1, 0.9) * seconds)
        assert problems_of(ending) == []
        assert ending.status == 2 or not (run.folder / "run").exists() or differences(contents(run.folder / "run"), expected) == []
        restore(run)
        assert differences(run.complete(), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["explain, batch", "distill"])
def test_a_clock_that_goes_back(subject: Callable[[str], Subject], case: str) -> None:
    run = subject(case)
    expected = run.complete()
    run.clear()
    ending = run.run(clock=True)
    assert ending.status == 0, ending.output
    assert differences(contents(run.folder / "run"), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["explain, batch", "distill", "study"])
def test_two_processes_in_one_folder(subject: Callable[[str], Subject], case: str) -> None:
    """The second one ends with an error and changes nothing."""
    run = subject(case)
    expected = run.complete()
    before = {path: path.stat().st_mtime_ns for path in (run.folder / "run").rglob("*") if path.name != ".lock"}
    with lock_folder(run.folder / "run"):
        ending = run.run()
    assert ending.status == 2 and "Another process is writing" in ending.output, ending.output
    assert {path: path.stat().st_mtime_ns for path in (run.folder / "run").rglob("*") if path.name != ".lock"} == before
    assert differences(run.complete(), expected) == []


@pytest.mark.parametrize("event", ["moved", "deleted", "replaced"])
def test_a_folder_that_is_no_longer_the_locked_one(tmp_path: Path, event: str) -> None:
    folder = tmp_path / "run"
    with lock_folder(folder) as lock:
        check_locked(folder, lock)
        if event == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(folder)
        if event == "replaced":
            folder.mkdir()
            (folder / ".lock").touch()
        with pytest.raises(KdxError, match="while kdx wrote to it"):
            check_locked(folder, lock)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(KdxError, match="cannot be written"):
        lock_folder(tmp_path / "run")


def test_an_error_of_the_system_about_a_file_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def vanished(*_: object, **__: object) -> None:
        (tmp_path / "run" / "scores.json").read_bytes()

    monkeypatch.setattr("kdx.commands.report.check_runs", vanished)
    status, _, error = in_folder(tmp_path, monkeypatch, capsys)("report", ".")
    assert status == 2 and "scores.json cannot be used: No such file or directory." in error and "Traceback" not in error
