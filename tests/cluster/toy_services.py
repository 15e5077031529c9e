"""Small services for tests of workers in other processes. They need no networks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdx.cluster.service import Facts
from kdx.errors import KdxError


class Toy:
    """Returns (task, process) for each task. Its subclasses do something else at some tasks."""

    def __init__(self) -> None:
        self.facts: Facts = {"runtime": "python"}

    def results(self, tasks: Sequence[int]) -> Iterator[tuple[int, int]]:
        for task in tasks:
            self.before(task)
            yield task, os.getpid()

    def before(self, task: int) -> None: ...

    def close(self) -> None: ...


class Ends(Toy):
    """Its process ends at task 5, like a process whose memory runs out."""

    def before(self, task: int) -> None:
        if task == 5:
            os._exit(1)


class Refuses(Toy):
    """Raises an error of the user at task 5."""

    def before(self, task: int) -> None:
        if task == 5:
            raise KdxError("Image 5 is odd.", "Remove it.")


class Fails(Toy):
    """Has a bug at task 5."""

    def before(self, task: int) -> None:
        if task == 5:
            raise ZeroDivisionError("a bug")


@dataclass(frozen=True)
class OneIsSlow:
    """Builds a service whose first worker needs a second per task, and the others 50 ms. folder: where the first writes its number."""

    folder: Path

    def __call__(self) -> Slow:
        with suppress(FileExistsError), (self.folder / "slow").open("x") as file:
            file.write(str(os.getpid()))
        return Slow((self.folder / "slow").read_text() == str(os.getpid()))


class Slow(Toy):
    def __init__(self, slow: bool) -> None:
        super().__init__()
        self._seconds = 1.0 if slow else 0.05

    def before(self, task: int) -> None:
        time.sleep(self._seconds)


class Unable(Toy):
    """A service that cannot be built."""

    def __init__(self) -> None:
        raise KdxError("The data differ.", "Copy them.")
