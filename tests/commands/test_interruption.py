"""Ctrl-C at the very start and at the very end of a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdx.commands import evaluate, explain, explain_students
from kdx.errors import Stopped
from kdx.runs.gallery_choice import GalleryChoice

AT_AN_IMPORT = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

module = sys.argv[1]

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from kdx.cli import main
sys.argv[1:] = ["layers", "--help"]
main()
"""

AT_THE_END = """
import atexit, os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.kill, os.getpid(), signal.SIGINT)
from kdx.cli import main
sys.argv[1:] = ["--version"]
main()
"""


IN_CODE_FROM_TEXT = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
from kdx.cli import commands, main

def work() -> None:
    exec("os.kill(os.getpid(), signal.SIGINT)", globals())

commands.app.command()(work)
sys.argv[1:] = ["work"]
main()
"""


IN_A_CALLBACK = """
import os, signal, sys, time, weakref

signal.signal(signal.SIGINT, signal.default_int_handler)
from kdx.cli import commands, main

def work() -> None:
    node = set()
    reference = weakref.ref(node, lambda _: os.kill(os.getpid(), name))
    del node
    time.sleep(60)

name = getattr(signal, sys.argv[1])
commands.app.command()(work)
sys.argv[1:] = ["work"]
main()
"""


AT_ONCE = """
import threading

start = threading.Timer.start

def send(timer) -> None:
    threading.Timer.start = start
    timer.function(*timer.args)

threading.Timer.start = send
"""


def ended(code: str, *arguments: str) -> tuple[int, str]:
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return process.returncode, process.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    "module", ["kdx.cli.commands", pytest.param("typer", marks=pytest.mark.slow), pytest.param("kdx.cli.study", marks=pytest.mark.slow)]
)
def test_ctrl_c_while_the_commands_are_imported_is_one_line(module: str) -> None:
    assert ended(AT_AN_IMPORT, module) == (130, "Stopped.\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_while_arguments_are_parsed_is_one_line() -> None:
    """typer alone would exit without a message. The help page is written while arguments are parsed."""
    assert ended(AT_AN_IMPORT, "rich.table") == (130, "Stopped.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_while_a_complete_command_ends_is_ignored() -> None:
    assert ended(AT_THE_END) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_in_code_from_text_is_status_130_also_after_python_m(tmp_path: Path) -> None:
    """Packages execute such code when they are imported. Python would then end by the signal, although it was handled."""
    (tmp_path / "interrupted.py").write_text(IN_CODE_FROM_TEXT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "interrupted"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (process.returncode, process.stderr) == (130, "Stopped.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_ctrl_c_in_a_callback_is_not_lost(name: str) -> None:
    """Imports and the garbage collector call such functions, in which Python ignores every exception."""
    assert ended(IN_A_CALLBACK, name) == (130, "Stopped.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_not_lost_while_python_reports_that_it_ignored_one() -> None:
    assert ended(AT_ONCE + IN_A_CALLBACK, "SIGINT") == (130, "Stopped.\n")


@pytest.mark.parametrize("command", ["explain", "explain_students", "evaluate"])
def test_ctrl_c_while_the_page_is_written_promises_to_resume(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the page shows is stored."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name in ("explain_dataset", "read_run", "_report_unreadable"):
        monkeypatch.setattr(explain, name, lambda *_, **__: None)
    monkeypatch.setattr(explain, "read_choice", lambda _: (GalleryChoice(), []))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "write_page", interrupt)
    monkeypatch.setattr(explain, "write_page", interrupt)
    monkeypatch.setattr(explain_students, "write_comparison", interrupt)
    with pytest.raises(Stopped):
        if command == "explain":
            explain.run("digits", tmp_path / "models.toml", tmp_path / "run")
        elif command == "evaluate":
            evaluate.run(tmp_path / "run")
        else:
            files = [tmp_path / f"{name}.toml" for name in "ab"]
            for file in files:
                file.write_text('student = "kdx:resnet"\n')
                (tmp_path / "out" / file.stem).mkdir(parents=True)
                (tmp_path / "out" / file.stem / "scores.json").write_text("{}")
            monkeypatch.setattr(explain, "write_page", lambda *_: None)
            explain_students.run("digits", {file.stem: file for file in files}, tmp_path / "out")
