"""OpenMP threads that wait without spinning, and the processes beside them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import kdx
from kdx import threads
from kdx.kernels import ambient


def running_threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.WAITING:
        monkeypatch.delenv(name, raising=False)


needs_libgomp = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "GOMP_parallel") or hasattr(ctypes.CDLL(None), "kmp_set_blocktime"),
    reason="PyTorch does not use libgomp here",
)


def processes(root: Path, running: str, *states: str) -> Path:
    """The files in /proc of a machine with so many running threads, of which this process has some in these states."""
    (root / "loadavg").write_text(f"0.50 0.40 0.30 {running}/412 9731\n")
    for number, state in enumerate(states):
        (root / f"self/task/{number}").mkdir(parents=True)
        (root / f"self/task/{number}/stat").write_text(f"{number} (a (b) c) {state} 1 2 3\n")
    return root


class TestCrowded:
    @pytest.fixture(autouse=True)
    def four_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "available_cores", lambda: 4)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)

    @pytest.mark.parametrize(
        ("team", "running", "states", "expected"),
        [
            (4, "1", "R", False),
            (4, "2", "R", True),
            (4, "4", "RRRRSS", False),  # own threads that spin after a region
            (4, "5", "RSRRRS", True),
            (2, "3", "R", False),  # two cores are left for a team of two
            (2, "4", "R", True),
            (1, "4", "R", False),
        ],
    )
    def test_others_want_cores_of_the_team(self, tmp_path: Path, team: int, running: str, states: str, expected: bool) -> None:
        assert threads.crowded(team, processes(tmp_path, running, *states)) is expected

    @pytest.mark.parametrize("running", ["0", "unknown"])
    def test_what_the_system_does_not_tell_counts_as_crowded(self, tmp_path: Path, running: str) -> None:
        assert threads.crowded(4, processes(tmp_path, running, "R"))
        assert threads.crowded(4, tmp_path / "no such folder")

    def test_a_limited_process_cannot_see_who_shares_its_cores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "available_cores", lambda: 3)
        assert threads.crowded(2, processes(tmp_path, "1", "R"))

    def test_a_process_that_runs_for_a_moment_is_no_neighbour(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        processes(tmp_path, "3", "R")
        looks, wanted = list[bool](), threads._wanted_by_others

        def look(free: int, files: Path) -> bool:
            if files != tmp_path:  # the watch of an earlier test looks at /proc
                return wanted(free, files)
            looks.append(wanted(free, files))
            (files / "loadavg").write_text("0.50 0.40 0.30 1/412 9732\n")
            return looks[-1]

        monkeypatch.setattr(threads, "LOOK_SECONDS", 60)
        monkeypatch.setattr(threads, "_wanted_by_others", look)
        assert not threads.crowded(4, tmp_path) and looks == [True, False]


@pytest.mark.usefixtures("no_setting")
@needs_libgomp
class TestPatient:
    @pytest.fixture(autouse=True)
    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[threads.Watch]:
        earlier, watch = threads._WATCH, threads.Watch()
        monkeypatch.setattr(threads, "_WATCH", watch)
        monkeypatch.setattr(threads, "KEPT_SECONDS", 0.02)
        monkeypatch.setattr(threads, "QUIET_SECONDS", 0.02)
        monkeypatch.setattr(threads, "INTERVAL", 0.005)
        monkeypatch.setattr(threads, "crowded", lambda _: True)
        assert wait_until(lambda: not earlier.watching and not earlier.patient)  # the team of an earlier test ends within the next one
        time.sleep(0.05)
        yield watch
        assert wait_until(lambda: not watch.watching and not watch.patient)

    def test_libgomp_manages_more_threads_than_cores_in_a_block_and_not_after_it(self, watch: threads.Watch) -> None:
        before, cores = running_threads(), len(os.sched_getaffinity(0))
        with threads.patient(2):
            # The watching thread, the thread of the team, and its team, which has one member more than there are cores.
            assert wait_until(lambda: running_threads() - before == 1 + (cores + 1))
            time.sleep(0.1)  # longer than the team is kept after a block
            assert watch.patient
        assert wait_until(lambda: running_threads() == before)

    def test_public_functions_are_such_blocks(self, watch: threads.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        with ambient.neutral():
            assert watch.patient

    def test_nested_and_parallel_blocks_share_one_team(self) -> None:
        before, cores = running_threads(), len(os.sched_getaffinity(0))
        together = threading.Barrier(4)

        def block(_: int) -> bool:
            with threads.patient(2), threads.patient(2):
                together.wait()
                expected = wait_until(lambda: running_threads() == before + 4 + 1 + (cores + 1))
                together.wait()
            return expected

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(block, range(4)))
        assert wait_until(lambda: running_threads() == before)

    def test_a_block_soon_after_another_finds_the_same_team(self, watch: threads.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "KEPT_SECONDS", 30)
        teams = []
        for _ in range(3):
            with threads.patient(2):
                teams.append(watch._team)
            time.sleep(0.02)
        assert teams[0] is teams[1] is teams[2] is not None
        monkeypatch.setattr(threads, "KEPT_SECONDS", 0.02)  # the test does not wait for 30 seconds

    def test_the_watch_follows_the_machine_in_a_block(self, watch: threads.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "crowded", lambda _: False)
        with threads.patient(2):
            assert not watch.patient
            monkeypatch.setattr(threads, "crowded", lambda _: True)
            assert wait_until(lambda: watch.patient)
            monkeypatch.setattr(threads, "crowded", lambda _: False)
            assert wait_until(lambda: not watch.patient)

    @pytest.mark.parametrize("name", threads.WAITING)
    def test_the_user_wins(self, watch: threads.Watch, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv(name, "ACTIVE")
        with threads.patient(2):
            assert not watch.patient and not watch.watching

    def test_one_thread_waits_for_nobody(self, watch: threads.Watch) -> None:
        with threads.patient(1):
            assert not watch.patient and not watch.watching

    def test_an_exception_ends_the_block(self, watch: threads.Watch) -> None:
        with pytest.raises(ZeroDivisionError), threads.patient(2):
            _ = 1 / 0
        assert wait_until(lambda: not watch.watching)

    def test_a_system_without_another_thread_computes_all_the_same(self, watch: threads.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            with threads.patient(2):
                assert not watch.patient and not watch.watching
        with threads.patient(2):
            assert watch.patient

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_starts_its_own_team(self, watch: threads.Watch) -> None:
        with threads.patient(2):
            assert watch.patient
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    watch.forget()  # the process does this for its own watch, in place of which the test has put another
                    with threads.patient(2):
                        status = 0 if watch.patient and running_threads() > 2 else 2
                finally:
                    os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class FakeRuntime:
    """A runtime of Intel's or LLVM's interface, which records the block times that it is given."""

    def __init__(self) -> None:
        self.times = [200]

    def kmp_get_blocktime(self) -> int:
        return self.times[-1]

    def kmp_set_blocktime(self, milliseconds: int) -> None:
        self.times.append(milliseconds)


@pytest.mark.usefixtures("no_setting")
def test_other_runtimes_are_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(threads, "_runtime", lambda: runtime)
    with pytest.raises(ZeroDivisionError), threads.patient(2), threads.patient(2):
        assert runtime.kmp_get_blocktime() == 0
        _ = 1 / 0
    assert runtime.times == [200, 0, 0, 0, 200]


@pytest.mark.usefixtures("no_setting")
def test_without_a_known_runtime_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_runtime", lambda: None)
    before = running_threads()
    with threads.patient(2):
        assert running_threads() == before


def test_results_do_not_depend_on_the_way_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    student, base = (torch.randn(24, 40, 5, 5, generator=generator) for _ in range(2))
    results = []
    for setting in (None, "ACTIVE"):
        for name in threads.WAITING:
            monkeypatch.delenv(name, raising=False)
        if setting:
            monkeypatch.setenv("OMP_WAIT_POLICY", setting)
        results.append(kdx.unicam(student, base, torch.arange(24) % 3).maps)
    assert torch.equal(*results)


def test_the_command_line_sets_the_environment_before_pytorch_is_loaded(tmp_path: Path) -> None:
    """The variables reach the C library, from which OpenMP reads them, and the processes that a command starts."""
    code = """
import ctypes, sys
import kdx.cli
kdx.cli.app = lambda: print("torch" in sys.modules, ctypes.CDLL(None).getenv(b"OMP_WAIT_POLICY") != 0)
kdx.cli.main()
"""
    clean = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    output = subprocess.run([sys.executable, "-c", code], env=clean, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "True"]
