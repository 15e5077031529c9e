"""Progress of long work: bars on a terminal, plain lines elsewhere. Rich is imported only when something is shown."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

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

    Output that goes to a file or another program has no width, so no table is cut there, unless COLUMNS states one.
    """
    from rich.console import Console

    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_UNLIMITED)


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
            console().print(f"{task} {done}/{total} {note}".rstrip(), markup=False, soft_wrap=True)

    yield line


@contextmanager
def _bars() -> Iterator[Show]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}"),
        BarColumn(min(40, console().width // 6)),
        MofNCompleteColumn(),
        # On a narrow terminal the note is cut, and nothing else.
        TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), speed_estimate_period=_SECONDS_OF_SPEED, expand=True) as bars:
        ids: dict[str, TaskID] = {}

        def advance(task: str, done: float, total: int, note: str) -> None:
            if task not in ids:
                ids[task] = bars.add_task(task, total=total, note="")
            bars.update(ids[task], completed=done, note=note)

        yield advance
