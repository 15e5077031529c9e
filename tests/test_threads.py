"""Threads: the cores that control groups allow, the user's own settings, and OpenMP threads that wait without spinning."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kdx
from kdx import threads
from kdx.data import images
from kdx.kernels import ambient


def machine(root: Path, groups: str, mounts: list[str], **quotas: str) -> Path:
    """A file system with these memberships, mounts, and files "folder__name" of quotas."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    lines = [f"{31 + number} 23 0:{28 + number} {mount}\n" for number, mount in enumerate(mounts)]
    (root / "proc/self/mountinfo").write_text("22 1 0:20 / / rw - ext4 /dev/vda rw\n" + "".join(lines))
    return root


def write(root: Path, name: str, content: str) -> None:
    file = root / "sys/fs/cgroup" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


V2 = "/ /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "/ /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"


class TestQuota:
    def test_version_2_takes_the_smallest_of_nested_groups(self, tmp_path: Path) -> None:
        root = machine(tmp_path, "0::/team/job/step\n", [V2])
        write(root, "team/cpu.max", "700000 100000\n")
        write(root, "team/job/cpu.max", "125000 50000\n")
        write(root, "team/job/step/cpu.max", "max 100000\n")
        assert threads.quota_cores(root) == 2.5
        assert threads.smaller_quota(root, 16) == 3
        assert threads.smaller_quota(root, 3) is None  # no smaller than what the libraries know already

    def test_groups_beside_and_below_do_not_count(self, tmp_path: Path) -> None:
        root = machine(tmp_path, "0::/team/job\n", [V2])
        write(root, "team/other/cpu.max", "100000 100000\n")
        write(root, "team/job/step/cpu.max", "100000 100000\n")
        assert threads.quota_cores(root) is None

    def test_a_container_sees_its_own_group_as_the_root(self, tmp_path: Path) -> None:
        root = machine(tmp_path, "0::/\n", [V2])
        write(root, "cpu.max", "150000 100000\n")
        assert threads.quota_cores(root) == 1.5

    @pytest.mark.parametrize("path", ["/docker/3f", "/../sibling", "/docker"])
    def test_a_group_outside_the_mounted_part_is_the_mount(self, tmp_path: Path, path: str) -> None:
        root = machine(tmp_path, f"0::{path}\n", ["/docker/3f /sys/fs/cgroup ro - cgroup2 cgroup2 rw"])
        write(root, "cpu.max", "300000 100000\n")
        assert threads.quota_cores(root) == 3

    def test_the_mounted_part_is_removed_from_the_path(self, tmp_path: Path) -> None:
        root = machine(tmp_path, "0::/docker/3f/inner\n", ["/docker/3f /sys/fs/cgroup ro - cgroup2 cgroup2 rw"])
        write(root, "inner/cpu.max", "50000 100000\n")
        write(root, "cpu.max", "300000 100000\n")
        assert threads.quota_cores(root) == 0.5
        assert threads.smaller_quota(root, 2) == 1

    def test_version_1(self, tmp_path: Path) -> None:
        root = machine(tmp_path, "5:memory:/a\n4:cpuset,cpu,cpuacct:/job/step\n1:name=systemd:/x:y\n", [V1])
        for group, quota in {"job": "400000", "job/step": "-1"}.items():
            write(root, f"cpu,cpuacct/{group}/cpu.cfs_quota_us", f"{quota}\n")
            write(root, f"cpu,cpuacct/{group}/cpu.cfs_period_us", "100000\n")
        assert threads.quota_cores(root) == 4

    def test_both_versions_together(self, tmp_path: Path) -> None:
        root = machine(tmp_path, "3:cpu,cpuacct:/job\n0::/job\n", [V1, V2.replace("cgroup rw", "cgroup/unified rw")])
        write(root, "cpu,cpuacct/job/cpu.cfs_quota_us", "600000")
        write(root, "cpu,cpuacct/job/cpu.cfs_period_us", "100000")
        write(root, "unified/job/cpu.max", "800000 100000")
        assert threads.quota_cores(root) == 6

    @pytest.mark.parametrize("content", ["", "max\n", "nonsense 100000\n", "100000 0\n", "0 100000\n"])
    def test_what_is_no_limit_limits_nothing(self, tmp_path: Path, content: str) -> None:
        root = machine(tmp_path, "0::/\n", [V2])
        write(root, "cpu.max", content)
        assert threads.quota_cores(root) is None

    def test_no_control_groups(self, tmp_path: Path) -> None:
        assert threads.quota_cores(tmp_path) is None


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A container with a quota of one core, in which PyTorch uses three threads."""
    for name in threads.COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "quota", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("container")
class TestNumberOfThreads:
    def test_the_quota_holds_in_a_block_and_is_restored(self) -> None:
        with ambient.neutral():
            assert torch.get_num_threads() == 1
            with ambient.neutral():
                assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), ambient.neutral():
            _ = 1 / 0
        assert torch.get_num_threads() == 3

    @pytest.mark.parametrize("name", threads.COUNTS)
    def test_the_user_wins(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv(name, "3")
        with ambient.neutral():
            assert torch.get_num_threads() == 3

    def test_decoders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counts = []

        @contextmanager
        def prefetch(_: object, workers: int, depth: int) -> Iterator[None]:
            counts.append(workers)
            yield

        monkeypatch.setattr(images, "prefetch", prefetch)
        with images.decoded(SimpleNamespace(decoder=None), [], (8, 8)):  # type: ignore[arg-type]
            assert counts == [1]


class TestEnvironment:
    def test_a_new_process_does_not_spin(self) -> None:
        environment: dict[str, str] = {}
        threads.set_environment(environment, None)
        assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}
        threads.set_environment(environment, 2)
        assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}

    @pytest.mark.parametrize("name", [*threads.WAITING, *threads.COUNTS])
    def test_the_user_wins(self, name: str) -> None:
        environment = {name: "7"}
        threads.set_environment(environment, 2)
        related = threads.WAITING if name in threads.WAITING else threads.COUNTS
        assert {key: value for key, value in environment.items() if key in related} == {name: "7"}


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
