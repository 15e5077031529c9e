"""The progress of long commands, as a terminal shows it at the end."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from kdx import progress
from kdx.cli.options import announce_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Inside the block, standard output is a terminal of 60 columns."""
    output = Terminal()
    console = Console(highlight=False, force_terminal=True, width=60, legacy_windows=False, color_system=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        patch.setattr(progress, "console", lambda: console)
        yield output


def screen(output: str) -> list[str]:
    """The lines of a terminal that has received this output: text, line feeds, carriage returns, and moves of the cursor upwards."""
    lines, row, column = [""], 0, 0
    for escape, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|([^\x1b])", output):
        if escape.endswith("A"):
            row -= int(escape[2:-1] or 1)
        elif escape.endswith("K"):
            lines[row] = "" if escape == "\x1b[2K" else lines[row][:column]
        elif text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_lines_that_a_command_prints_leave_no_copy_of_the_bars() -> None:
    with terminal() as output, progress.job_display(2) as display:
        display.note("first", "epoch 1 of 2")
        announce_line("[1/2] first: 1.0 s")
        display.end("first")
        display.note("second", "epoch 1 of 2")
        announce_line("Warning: [2/2] second: 1.0 s")
        display.end("second")
    first, second, bar = screen(output.getvalue())
    assert (first, second) == ("[1/2] first: 1.0 s", "Warning: [2/2] second: 1.0 s")
    assert bar.startswith("jobs ━") and " 2/2 " in bar  # at the end the bar is full and no job is running


def test_every_running_job_has_a_line() -> None:
    with terminal() as output, progress.job_display(3) as display:
        display.note("digits/large/tiny/kd/seed0", "student, epoch 3 of 10")
        display.note("digits/large/tiny/a-long-name-of-a-method/seed0", "Geometry of layer3, 40 of 120")
        time.sleep(0.3)  # the bars are drawn ten times per second
        lines = screen(output.getvalue())
    assert " 0/3 " in lines[0]
    assert lines[1:] == [
        "digits/large/tiny/kd/seed0: student, epoch 3 of 10",
        "…-long-name-of-a-method/seed0: Geometry of layer3, 40 of 120",
    ]


@pytest.mark.parametrize("width", [1, 5, 20, 40, 80])
def test_a_line_fits_and_keeps_the_note(width: int) -> None:
    line = progress.fitted("digits/large/tiny/kd/seed0", "epoch 3 of 10", width)
    assert len(line) <= width
    assert width < 20 or line.endswith("epoch 3 of 10")
    assert width < 80 or line == "digits/large/tiny/kd/seed0: epoch 3 of 10"
