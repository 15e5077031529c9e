"""The command line for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import command_line as commands
from tests.command_line import Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``run(*arguments) -> (status, stdout, stderr)`` of the command line, in an empty current folder."""
    return commands.in_folder(tmp_path, monkeypatch, capsys)
