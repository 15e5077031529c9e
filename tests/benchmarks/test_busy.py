"""The benchmark beside busy processes: its cases, and that the busy processes run only when they should."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import busy
from benchmarks.cases import CASES, PROCESS_KINDS
from benchmarks.neighbours import Neighbours
from kdx import threads
from kdx.runs.environment import environment


def test_every_case_of_one_process_is_a_main_case() -> None:
    others = {"estimators", "beside dcor", "export"}  # other libraries, and an export, which Python dominates
    assert {case.kind for case in CASES} == busy.KINDS | PROCESS_KINDS | others
    assert len(busy.main_cases([""])) > 30 and not busy.main_cases(["no such case"])
    assert environment()["threads"] > 0


def test_neighbours_run_only_in_their_block() -> None:
    def ticks(processes: list[int]) -> int:
        return sum(int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11]) for pid in processes)

    with Neighbours() as neighbours:
        pids = [process.pid for process in neighbours._processes]
        assert len(pids) == threads.available_cores()
        time.sleep(0.1)
        stopped = ticks(pids)
        time.sleep(0.2)
        assert ticks(pids) == stopped
        with neighbours.running():
            time.sleep(0.5)
        assert ticks(pids) > stopped
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in pids)
    with Neighbours(busy=False) as none, none.running():
        assert not none._processes
