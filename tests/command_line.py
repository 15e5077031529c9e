"""Runs the command line within this process, and lists the files that it leaves."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from rich.console import Console

from kdx import progress
from kdx.cli import main

_command = functools.cache(typer.main.get_command)
"""Typer reads all commands again for every call, which takes longer than most calls of the tests."""

Run = Callable[..., tuple[int, str, str]]
"""``run(*arguments) -> (status, stdout, stderr)``."""


def status_of(*arguments: object) -> int:
    """The exit status of ``kdx`` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kdx", *map(str, arguments)])
        patch.setattr(typer.main, "get_command", _command)
        try:
            main()
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int)
            return stop.code or 0
    return 0


def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``kdx`` with ``folder`` as the current folder, and lines of 200 columns so that errors and help pages do not wrap."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    console = Console(highlight=False)
    monkeypatch.setattr(progress, "console", lambda: console)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = status_of(*arguments)
        return status, *capsys.readouterr()

    return run


def left_in(folder: Path) -> list[str]:
    """Every file below ``folder``, by its path from there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
