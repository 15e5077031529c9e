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
from functools import partial
from pathlib import Path

import pytest
import torch

import kdx
from kdx import patience, threads
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
        monkeypatch.setattr(patience, "available_cores", lambda: 4)
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
        assert patience.crowded(team, processes(tmp_path, running, *states)) is expected

    @pytest.mark.parametrize("running", ["0", "unknown"])
    def test_what_the_system_does_not_tell_counts_as_crowded(self, tmp_path: Path, running: str) -> None:
        assert patience.crowded(4, processes(tmp_path, running, "R"))
        assert patience.crowded(4, tmp_path / "no such folder")

    def test_a_limited_process_cannot_see_who_shares_its_cores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patience, "available_cores", lambda: 3)
        assert patience.crowded(2, processes(tmp_path, "1", "R"))

    def test_a_process_that_runs_for_a_moment_is_no_neighbour(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        processes(tmp_path, "3", "R")
        looks, wanted = list[bool](), patience._wanted_by_others

        def look(free: int, files: Path) -> bool:
            if files != tmp_path:  # the watch of an earlier test looks at /proc
                return wanted(free, files)
            looks.append(wanted(free, files))
            (files / "loadavg").write_text("0.50 0.40 0.30 1/412 9732\n")
            return looks[-1]

        monkeypatch.setattr(patience, "LOOK_SECONDS", 60)
        monkeypatch.setattr(patience, "_wanted_by_others", look)
        assert not patience.crowded(4, tmp_path) and looks == [True, False]


class TestWaits:
    @pytest.fixture
    def tasks(self, tmp_path: Path) -> Callable[..., None]:
        """Writes the nanoseconds that each thread has run and waited."""

        def write(**times: tuple[int, int]) -> None:
            for path in (tmp_path / "self/task").glob("*/schedstat"):
                path.unlink()
            for name, (run, waited) in times.items():
                (tmp_path / "self/task" / name.lstrip("t")).mkdir(parents=True, exist_ok=True)
                (tmp_path / "self/task" / name.lstrip("t") / "schedstat").write_text(f"{run} {waited} 17\n")

        return write

    def test_the_share_is_that_of_the_last_intervals(
        self, tmp_path: Path, tasks: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(patience, "COUNTED", 2)
        tasks(t1=(9_000_000, 1_000_000), t2=(5_000_000, 0))
        waits = patience.Waits(tmp_path)
        tasks(t1=(15_000_000, 3_000_000), t2=(6_000_000, 1_000_000))
        assert waits.share() == 3 / 10
        tasks(t1=(15_000_000, 13_000_000), t3=(30_000_000, 0))  # the second thread has ended, and a third one started
        assert waits.share() == (3 + 10) / (10 + 40)
        tasks(t1=(15_000_000, 13_000_000), t3=(60_000_000, 0))
        assert waits.share() == (10 + 0) / (40 + 30)

    def test_threads_that_hardly_want_to_run_say_nothing(self, tmp_path: Path, tasks: Callable[..., None]) -> None:
        tasks(t1=(0, 0))
        waits = patience.Waits(tmp_path)
        tasks(t1=(2_000_000, 2_000_000))
        assert waits.share() is None

    def test_the_calling_thread_does_not_count(self, tmp_path: Path, tasks: Callable[..., None]) -> None:
        own = f"t{threading.get_native_id()}"
        tasks(**{"t1": (0, 0), own: (0, 0)})
        waits = patience.Waits(tmp_path)
        tasks(**{"t1": (8_000_000, 2_000_000), own: (0, 90_000_000)})
        assert waits.share() == 1 / 5

    @pytest.mark.parametrize("content", [None, "", "1 2", "a b c"])
    def test_a_system_that_does_not_tell_is_looked_at_instead(
        self, tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "self/task/1").mkdir(parents=True)
        if content is not None:
            (tmp_path / "self/task/1/schedstat").write_text(content)
        monkeypatch.setattr(patience, "Waits", partial(patience.Waits, tmp_path))
        looks = iter([True, False, True])
        monkeypatch.setattr(patience, "crowded", lambda _: next(looks))
        answers = patience._answers(2)
        assert [next(answers) for _ in range(3)] == [True, False, True]

    @pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell how long a thread waits")
    def test_a_thread_beside_many_busy_processes_waits(self) -> None:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * (os.cpu_count() or 1))]
        over = threading.Event()
        worker = threading.Thread(target=lambda: [None for _ in iter(over.is_set, True)])
        worker.start()
        try:
            answers = patience._answers(1)
            next(answers)
            time.sleep(1)
            assert next(answers)
        finally:
            over.set()
            worker.join()
            for process in busy:
                process.kill()
                process.wait()


@pytest.mark.usefixtures("no_setting")
@needs_libgomp
class TestPatient:
    @pytest.fixture(autouse=True)
    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[patience.Watch]:
        earlier, watch = patience._WATCH, patience.Watch()
        monkeypatch.setattr(patience, "_WATCH", watch)
        monkeypatch.setattr(patience, "KEPT_SECONDS", 0.02)
        monkeypatch.setattr(patience, "RECENT_SECONDS", 0.02)
        monkeypatch.setattr(patience, "INTERVAL", 0.005)
        self.answer(monkeypatch, True)
        assert wait_until(lambda: not earlier.watching and not earlier.patient)  # the team of an earlier test ends within the next one
        time.sleep(0.05)
        yield watch
        assert wait_until(lambda: not watch.watching and not watch.patient)

    @staticmethod
    def answer(monkeypatch: pytest.MonkeyPatch, crowded: bool) -> None:
        """What the first look and the watch find from now on."""
        monkeypatch.setattr(patience, "crowded", lambda _: crowded)
        monkeypatch.setattr(patience.Waits, "share", lambda _: float(crowded))

    def test_libgomp_manages_more_threads_than_cores_in_a_block_and_not_after_it(self, watch: patience.Watch) -> None:
        before, cores = running_threads(), len(os.sched_getaffinity(0))
        with patience.patient(2):
            # The watching thread, the thread of the team, and its team, which has one member more than there are cores.
            assert wait_until(lambda: running_threads() - before == 1 + (cores + 1))
            time.sleep(0.1)  # longer than the team is kept after a block
            assert watch.patient
        assert wait_until(lambda: running_threads() == before)

    def test_public_functions_are_such_blocks(self, watch: patience.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        with ambient.neutral():
            assert watch.patient

    def test_nested_and_parallel_blocks_share_one_team(self) -> None:
        before, cores = running_threads(), len(os.sched_getaffinity(0))
        together = threading.Barrier(4)

        def block(_: int) -> bool:
            with patience.patient(2), patience.patient(2):
                together.wait()
                expected = wait_until(lambda: running_threads() == before + 4 + 1 + (cores + 1))
                together.wait()
            return expected

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(block, range(4)))
        assert wait_until(lambda: running_threads() == before)

    def test_a_block_soon_after_another_finds_the_same_team(self, watch: patience.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patience, "KEPT_SECONDS", 30)
        teams = []
        for _ in range(3):
            with patience.patient(2):
                teams.append(watch._team)
            time.sleep(0.02)
        assert teams[0] is teams[1] is teams[2] is not None
        monkeypatch.setattr(patience, "KEPT_SECONDS", 0.02)  # the test does not wait for 30 seconds

    def test_the_watch_follows_the_machine_in_a_block(self, watch: patience.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer(monkeypatch, False)
        with patience.patient(2):
            assert not watch.patient
            self.answer(monkeypatch, True)
            assert wait_until(lambda: watch.patient)
            self.answer(monkeypatch, False)
            assert wait_until(lambda: not watch.patient)

    def test_the_watch_corrects_the_first_look(self, watch: patience.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a container, the first look cannot know that no other process needs the cores."""
        monkeypatch.setattr(patience.Waits, "share", lambda _: 0.0)
        with patience.patient(2):
            assert watch.patient
            assert wait_until(lambda: not watch.patient)

    def test_the_first_look_is_not_repeated_while_answers_are_recent(self, watch: patience.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patience, "RECENT_SECONDS", 30)
        looks = list[int]()

        def look(team: int) -> bool:
            looks.append(team)
            return False

        monkeypatch.setattr(patience, "crowded", look)
        monkeypatch.setattr(patience.Waits, "share", lambda _: 0.0)
        for _ in range(3):
            with patience.patient(2):
                assert not watch.patient
        assert looks == [2]

    @pytest.mark.parametrize("name", threads.WAITING)
    def test_the_user_wins(self, watch: patience.Watch, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv(name, "ACTIVE")
        with patience.patient(2):
            assert not watch.patient and not watch.watching

    def test_one_thread_waits_for_nobody(self, watch: patience.Watch) -> None:
        with patience.patient(1):
            assert not watch.patient and not watch.watching

    def test_an_exception_ends_the_block(self, watch: patience.Watch) -> None:
        with pytest.raises(ZeroDivisionError), patience.patient(2):
            _ = 1 / 0
        assert wait_until(lambda: not watch.watching)

    def test_a_system_without_another_thread_computes_all_the_same(self, watch: patience.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            with patience.patient(2):
                assert not watch.patient and not watch.watching
        with patience.patient(2):
            assert watch.patient

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_starts_its_own_team(self, watch: patience.Watch) -> None:
        with patience.patient(2):
            assert watch.patient
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    watch.forget()  # the process does this for its own watch, in place of which the test has put another
                    with patience.patient(2):
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
    monkeypatch.setattr(patience, "_runtime", lambda: runtime)
    with pytest.raises(ZeroDivisionError), patience.patient(2), patience.patient(2):
        assert runtime.kmp_get_blocktime() == 0
        _ = 1 / 0
    assert runtime.times == [200, 0, 0, 0, 200]


@pytest.mark.usefixtures("no_setting")
def test_without_a_known_runtime_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_runtime", lambda: None)
    before = running_threads()
    with patience.patient(2):
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
