"""A long run keeps the same number of files and threads, and takes no memory per batch; a plan has no object per image."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from benchmarks import long
from kdx import progress
from kdx.commands import explain
from kdx.runs.plan import Plan, RunOptions


def test_the_tenths_are_compared() -> None:
    samples = np.array([[0.5 * number, 100 + number // 10, 7, 3] for number in range(100)], dtype=np.float64)
    tenths = long.tenths(samples)
    assert tenths["seconds per batch"] == [0.5] * 10 and tenths["resident bytes"] == [100 + number for number in range(10)]
    assert tenths["open files"] == [7] * 10 and tenths["threads"] == [3] * 10


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["batch", "whole"])
def test_nothing_grows_from_batch_to_batch(geometry: str, tmp_path: Path) -> None:
    """Traced memory is that of Python and NumPy, which is exact, unlike the memory of the process."""
    long.write_data(tmp_path, 1_280 if geometry == "batch" else 640)
    traced: list[int] = []
    states = []

    def show(task: str, done: float, total: int, note: str) -> None:
        if task in ("Explaining", "Networks"):
            traced.append(tracemalloc.get_traced_memory()[0])
            states.append(long.state())

    options = RunOptions(batch=32, geometry=geometry, permutations=19, runtime="eager", device="cpu", gallery=2)  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        with progress.redirected(show):
            explain.run(str(tmp_path / "images.npz"), tmp_path / "models.toml", tmp_path / "run", (), options, announce=lambda line: None)
    finally:
        tracemalloc.stop()
    fifth = len(states) // 5
    files, threads = (np.array([state[column] for state in states[fifth:]]) for column in (2, 3))
    assert files.max() - files.min() <= 1  # one may be open for the file that is written
    assert len(set(threads.tolist())) == 1
    per_batch = (np.median(traced[-fifth:]) - np.median(traced[fifth : 2 * fifth])) / (len(states) - 2 * fifth)
    assert per_batch < 5_000  # the levels of a batch have five times as many bytes


def test_a_plan_holds_no_object_per_image(tmp_path: Path) -> None:
    long.write_data(tmp_path, 50_000, side=2)
    tracemalloc.start()
    try:
        plan = Plan.of(str(tmp_path / "images.npz"), tmp_path / "models.toml", (), RunOptions(split="all"))
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(plan.indices) == 50_000
    assert kept < 60 * 50_000 + 2_000_000  # levels 4, labels, indices and splits 8 each, and the modules that are imported
