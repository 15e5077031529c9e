"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdx.distill import EpochResult, distill
from tests.distill.small import QUICK, STUDENT, TEACHER, summaries
from tests.made_once import made_once


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """For networks this small, threads cost more in waiting than they save, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""

    def train(folder: Path) -> None:
        results: list[EpochResult] = []
        distill("digits", teacher=TEACHER, student=STUDENT, out=folder / "run", settings=QUICK, report=results.append)
        assert summaries(results) == [
            ("teacher", 1, True),
            ("teacher", 2, True),
            *((name, epoch, True) for name in ("base", "student") for epoch in (1, 2, 3)),
        ]

    return made_once(tmp_path_factory, "distill", train) / "run"
