"""Whole processes: they end as expected, and the page shows their times with the goals."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cold, readme
from benchmarks.comparison import Comparison

SECONDS = {
    "kdx --version": 0.3,
    "kdx --help": 0.5,
    "kdx explain --no-such-option": 0.4,
    "import torch": 1.0,
    "import kdx": 1.2,
    "import kdx; kdx.unicam": 1.5,
}


def status(comparison: Comparison, name: str) -> int:
    """Run one process and check how it ended."""
    with ExitStack() as resources:
        run, reason = comparison.open(name, resources)
        assert run is not None, reason
        return int(comparison.check({name: run()})[f"status of {name}"])


def test_every_process_has_a_time_in_the_table() -> None:
    assert [*cold.COMMANDS, *cold.IMPORTS] == list(cold.process_start(Path()).variants) == list(SECONDS)


@pytest.mark.parametrize("name", ["kdx explain --no-such-option", pytest.param("import kdx; kdx.unicam", marks=pytest.mark.slow)])
def test_processes_end_as_expected(name: str, tmp_path: Path) -> None:
    assert status(cold.process_start(tmp_path), name) == cold.COMMANDS.get(name, 0)


def test_a_process_that_ends_otherwise_is_never_timed() -> None:
    result = {"status": 1, "output": "", "errors": "It broke."}
    for name in SECONDS:
        with pytest.raises(SystemExit, match=f"{name} ended with status 1: It broke"):
            cold.process_start(Path()).check({name: result})


def test_the_table_shows_goals_without_figures() -> None:
    assert readme.process_start({}).count("not measured") == 5


def test_the_table_judges_times_and_differences() -> None:
    record: dict[str, Any] = {"case": "process start", "kind": "process start", "samples": {n: [s] * 3 for n, s in SECONDS.items()}}
    record |= {"over": "import torch", "missing": {}, "goals": [], "commit": "abc"}
    record["environment"] = {"processor": "A processor", "threads": 1, "torch": "2", "onnxruntime": "1"}
    text = readme.process_start({"process start": record})
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert "| 500 ms (500 ms to 500 ms) |" in rows["kdx --help"] and rows["kdx --help"].endswith("| missed |")
    assert rows["kdx --version"].endswith("| the median at most 0.4 s | reached |")
    plain, used = (rows[f'python -c "{code}"'] for code in ("import kdx", "import kdx; kdx.unicam"))
    assert "| 200 ms (200 ms to 200 ms) |" in plain and plain.endswith("| the difference at most 0.3 s | reached |")
    assert used.endswith("| the difference at most 0.3 s | missed |")
    assert "A processor" in text and "3 paired rounds" in text


def test_the_memory_of_a_process_that_starts_others_is_not_shown() -> None:
    record = {"kind": "cold start", "peak_bytes": {"kdx": 3e8}}
    assert readme._peak(record, "kdx") == readme.NONE and readme._peak(record | {"kind": "geometry"}, "kdx") == "0.30 GB"
