"""Like `test_death`, in one process and in a second: after a "death", every change of the disk is refused, so the disk stays as a
killed process would leave it.

The interpreter announces opening, renaming and deleting of files to a hook (PEP 578); it does not announce writing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kdx.runs.run import RunOptions, explain_dataset
from tests.hostile.cases import contents, differences, write_inputs

_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate")
OPTIONS = RunOptions(batch=8, geometry="batch", permutations=5, runtime="eager", gallery=1)


class Death(BaseException):
    """Stands for the end of the process. Nothing catches it."""


class _Hook:
    """Counts the changes below a folder, and refuses all from a given number on."""

    folder: str | None = None
    count = last = 0
    is_added = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or not (event in _EVENTS or (event == "open" and _writes(arguments))):
            return
        if str(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count > self.last:
                raise Death


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


_hook = _Hook()


@contextmanager
def dying(folder: Path, after: int) -> Iterator[_Hook]:
    """Inside the block, the first ``after`` changes below the folder succeed."""
    if not _hook.is_added:
        sys.addaudithook(_hook)  # Python cannot remove it
        _hook.is_added = True
    _hook.folder, _hook.count, _hook.last = str(folder), 0, after
    try:
        yield _hook
    finally:
        _hook.folder = None


def test_a_run_that_dies_resumes_to_the_same_files(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    out = tmp_path / "run"

    def run() -> None:
        explain_dataset(str(tmp_path / "pictures"), tmp_path / "models.toml", out, (), OPTIONS, announce=lambda line: None)

    with dying(out, 10**6) as changes:
        run()
    expected, count = contents(out), changes.count
    assert count > 100
    for after in range(7, count, 61):
        out.rename(tmp_path / f"before-{after}")
        with pytest.raises(Death), dying(out, after):
            run()
        run()
        assert differences(contents(out), expected) == [], after
