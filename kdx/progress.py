"""Progress of long work: bars on a terminal, plain lines elsewhere. Rich is imported only when something is shown."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, TaskID

Show = Callable[[str, float, int, str], None]
"""show(task, done, total, note): ``done`` of ``total`` steps of the task are complete, on a terminal also parts of a step."""

_SECONDS_BETWEEN_LINES = 10.0

_SECONDS_OF_SPEED = 300.0
"""The time left follows from the speed in this time, which should include slow parts that recur, such as the validation of an epoch."""

_elsewhere: ContextVar[Show | None] = ContextVar("elsewhere", default=None)

_UNLIMITED = 10_000  # columns


@cache
def console() -> Console:
    """The console on standard output, for tables, status lines and progress bars.

    Output that goes to a file or another program has no width, so no table is cut there, unless COLUMNS states one. Text is shown as it
    is: Rich would replace ``:100:``, which references contain, by a picture.
    """
    from rich.console import Console

    terminal = Console(highlight=False, emoji=False)
    return terminal if terminal.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, emoji=False, width=_UNLIMITED)


def print_line(line: str, style: str | None = None) -> None:
    """Print a line on standard output, above the bars if there are any. The terminal wraps it; it contains no markup."""
    console().print(line, style=style, markup=False, soft_wrap=True)


@contextmanager
def redirected(show: Show) -> Iterator[None]:
    """Inside the block, ``show`` receives the progress, and nothing is printed: for work that is a part of other work with a display."""
    token = _elsewhere.set(show)
    try:
        yield
    finally:
        _elsewhere.reset(token)


@contextmanager
def progress() -> Iterator[Show]:
    """One bar per task on a terminal. Elsewhere a line every ten seconds, and one at the end of each task."""
    if (elsewhere := _elsewhere.get()) is not None:
        yield elsewhere
        return
    if console().is_terminal:
        with _bars() as show:
            yield show
        return
    last = time.monotonic()

    def line(task: str, done: float, total: int, note: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print_line(f"{task} {done}/{total} {note}".rstrip())

    yield line


class JobDisplay(Protocol):
    """Shows the jobs of a long command, of which several may run at once."""

    def note(self, job: str, note: str) -> None:
        """Show the current step of a running job."""

    def end(self, job: str) -> None:
        """Show that a job has ended."""


@contextmanager
def job_display(total: int) -> Iterator[JobDisplay]:
    """On a terminal, a bar for all jobs and a line for each running job; elsewhere, a line every ten seconds."""
    if not total or not console().is_terminal:
        yield _JobLines(total)
        return
    with _job_bars(total) as bars:
        yield bars


class _JobLines:
    """Plain lines about jobs, at most one every ten seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._ended, self._last = total, 0, time.monotonic()

    def note(self, job: str, note: str) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print_line(f"jobs {self._ended}/{self._total} {job}: {note}")

    def end(self, _job: str) -> None:
        self._ended += 1


@contextmanager
def _job_bars(total: int) -> Iterator[JobDisplay]:
    from rich.console import RenderableType
    from rich.progress import Progress
    from rich.text import Text

    notes: dict[str, str] = {}

    class Bars(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            for job, note in list(notes.items()):
                yield Text(fitted(job, note, console().width), no_wrap=True, overflow="ellipsis")

    with Bars(*_columns(), console=console(), speed_estimate_period=_SECONDS_OF_SPEED, expand=True) as bars:
        task = bars.add_task("jobs", total=total, note="")

        class Display:
            def note(self, job: str, note: str) -> None:
                notes[job] = note

            def end(self, job: str) -> None:
                notes.pop(job, None)
                bars.advance(task)

        yield Display()


def fitted(job: str, note: str, width: int) -> str:
    """``job: note`` in at most ``width`` characters. If it is too long, the start of the name is cut, because its end differs between
    jobs."""
    room = width - len(note) - 2
    if len(job) > room:
        job = f"…{job[len(job) - room + 1 :]}" if room > 1 else "…"
    return f"{job}: {note}"[:width]


def _columns() -> tuple[ProgressColumn, ...]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return (
        TextColumn("{task.description}"),
        BarColumn(min(40, console().width // 6)),
        MofNCompleteColumn(),
        # On a narrow terminal the note is cut, and nothing else.
        TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        TimeRemainingColumn(),
    )


@contextmanager
def _bars() -> Iterator[Show]:
    from rich.progress import Progress

    with Progress(*_columns(), console=console(), speed_estimate_period=_SECONDS_OF_SPEED, expand=True) as bars:
        ids: dict[str, TaskID] = {}

        def advance(task: str, done: float, total: int, note: str) -> None:
            if task not in ids:
                ids[task] = bars.add_task(task, total=total, note="")
            bars.update(ids[task], completed=done, note=note)

        yield advance
