"""The number of threads: the cores that control groups allow, and the user's own settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
    def test_a_new_process_has_the_limit_and_waits_as_its_runtime_does(self) -> None:
        """Spinning is faster on an idle machine, and `kdx.patience` ends it on a crowded one."""
        environment: dict[str, str] = {}
        threads.set_environment(environment, None)
        assert environment == {}
        threads.set_environment(environment, 2)
        assert environment == {"OMP_NUM_THREADS": "2"}

    @pytest.mark.parametrize("name", threads.COUNTS)
    def test_the_user_wins(self, name: str) -> None:
        environment = {name: "7"}
        threads.set_environment(environment, 2)
        assert environment == {name: "7"}

    def test_the_limit_of_a_container_is_no_choice_of_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "_limit", None)
        for name in threads.COUNTS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "environ", {**os.environ})
        threads.set_environment(os.environ, 8)
        assert os.environ["OMP_NUM_THREADS"] == "8" and threads.chosen() is None  # not one worker with all cores of a cluster
        os.environ["OMP_NUM_THREADS"] = "2"
        assert threads.chosen() == 2
