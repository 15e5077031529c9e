"""What long work shows: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(highlight=False)

Show = Callable[[str, int, int, str], None]
"""show(what, done, total, note): ``what`` has come to ``done`` of ``total``."""

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress() -> Iterator[Show]:
    """A bar for each ``what`` that is shown; where there is no terminal, its last line and one every ten seconds."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bars:
            tasks: dict[str, TaskID] = {}

            def advance(what: str, done: int, total: int, note: str) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total, note="")
                bars.update(tasks[what], completed=done, note=note)

            yield advance
        return
    last = time.monotonic()

    def line(what: str, done: int, total: int, note: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{what} {done}/{total} {note}".rstrip(), markup=False, soft_wrap=True)

    yield line
