"""Fixtures of the tests with faults of the disk: the process that forks, tiny inputs, and the commands that run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.cases import COMMANDS, Subject, write_inputs
from tests.hostile.forked import Forked


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    with Forked() as process:
        yield process


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_inputs(folder)
    return folder


@pytest.fixture
def subject(forked: Forked, inputs: Path) -> Iterator[Callable[[str], Subject]]:
    """Makes the subject of a case."""
    subjects: list[Subject] = []

    def of(case: str) -> Subject:
        subjects.append(Subject(forked, inputs, COMMANDS[case]))
        subjects[-1].clear()
        return subjects[-1]

    yield of
    for each in subjects:
        each.clear()
