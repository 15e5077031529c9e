"""Runs that join a cluster which ``ray start`` started: the bytes of one process, and the cluster runs on as before."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.test_ray import bytes_of, children, command, one_thread, started
from tests.cluster.test_ray import finished as finished
from tests.cluster.test_ray import limited as limited
from tests.cluster.test_ray import pictures as pictures
from tests.runs.conftest import folder as folder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of Ray in /proc")]


@dataclass(frozen=True)
class Cluster:
    """address: HOST:PORT. environment: the variables of its clients. process: that of ``ray start``."""

    address: str
    environment: dict[str, str]
    process: int

    def workers(self) -> list[int]:
        """The processes of kdx's workers. Fails if the cluster does not run any more."""
        (raylet,) = (pid for pid, line in children(self.process).items() if "raylet/raylet" in line.split("\0")[0])
        assert any("gcs_server" in line.split("\0")[0] for line in children(self.process).values())
        return [pid for pid, line in children(raylet).items() if line.startswith("ray::Worker")]

    def wait_until_free(self) -> None:
        """Wait until the workers have ended; `limited` ends this if they do not."""
        while self.workers():
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster with two cores. It listens on all network interfaces, so it accepts only clients with its token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="kdx-ray-", dir="/tmp")  # the paths of Ray's sockets must be short
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": folder}
    start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--port", str(port), "--num-cpus", "2"]
    log = Path(folder, "start.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*start, "--include-dashboard", "false", "--disable-usage-stats"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    try:
        deadline = time.monotonic() + 120
        while "--block" not in log.read_text():  # its last message
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Cluster(f"127.0.0.1:{port}", environment, process.pid)
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()  # which ends all processes of the cluster
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_in_a_running_cluster_has_the_bytes_of_one_process(
    cluster: Cluster, pictures: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    again = command(pictures, tmp_path / "run", "--cluster", cluster.address, "--cpus-per-worker", "1")
    subprocess.run(again, check=True, capture_output=True, timeout=200, env=one_thread() | cluster.environment)
    assert bytes_of(tmp_path / "run") == finished
    cluster.wait_until_free()


@pytest.mark.exhaustive
def test_ctrl_c_frees_the_workers_and_the_run_resumes_in_the_same_cluster(
    cluster: Cluster, pictures: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    """The second run finds the cluster by itself, and its workers take both cores."""
    process = started(pictures, tmp_path / "run", cluster.address, **cluster.environment)
    assert cluster.workers()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate()
    assert process.returncode == 130 and errors.strip() == "Stopped. Run the same command again to resume."
    cluster.wait_until_free()
    again = command(pictures, tmp_path / "run", "--cluster", "auto", "--cpus-per-worker", "1")
    env = one_thread() | cluster.environment
    result = subprocess.run(again, check=True, capture_output=True, text=True, timeout=200, env=env)
    assert "Resuming" in result.stdout
    assert bytes_of(tmp_path / "run") == finished
    cluster.wait_until_free()


def test_a_killed_driver_frees_the_workers(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    process = started(pictures, tmp_path / "run", cluster.address, **cluster.environment)
    assert cluster.workers()
    process.kill()
    process.communicate()
    cluster.wait_until_free()
