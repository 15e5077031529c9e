"""Runs with workers of a real Ray on this machine have the bytes of a run in one process, whichever process is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdx.choices import GeometryName
from kdx.cluster.executor import RayExecutor
from kdx.cluster.options import ClusterOptions
from kdx.cluster.ray_crew import RayCrew, connected
from kdx.cluster.service import Facts
from kdx.commands import explain
from kdx.errors import KdxError
from kdx.kernels import ambient
from kdx.runs import distributed
from kdx.runs.store import Store
from tests.cluster import toy_services
from tests.runs.conftest import folder as folder
from tests.runs.small_run import CLASSES, OPTIONS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")]

DIFFERENT = ("manifest.json", "report.html")
"""The files of a run that contain times and the machine."""


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """Each test has four minutes. A cluster that hangs fails its test, and the others run."""

    def stop(*_: Any) -> None:
        raise TimeoutError("the test takes longer than four minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One cluster of this machine for the module, with more cores than it has, so that four workers fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdx.threads.available_cores", lambda: 4)
        with connected(ClusterOptions()) as module:
            yield module


@pytest.fixture(scope="module")
def pictures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks of the tests of runs, and 87 pictures: enough batches for a process to be killed between two of them."""
    root = tmp_path_factory.mktemp("pictures") / "explain"
    shutil.copytree(folder, root)
    random = np.random.default_rng(1)
    for number in range(58):
        pixels = random.integers(0, 256, (14, 17, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / CLASSES[number % 3] / f"more-{number}.png")
    return root


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run in this process with one thread."""
    return bytes_of(alone(pictures, tmp_path_factory.mktemp("one") / "run", "batch"))


def alone(folder: Path, out: Path, geometry: GeometryName) -> Path:
    with ambient.torch_threads(1):
        run(folder, out, geometry, None)
    return out


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, out: Path, *options: str, program: Sequence[str] = (str(Path(sys.executable).parent / "kdx"),)) -> list[str]:
    kdx = [*program, "explain", str(folder / "pictures"), "--models", str(folder / "models.toml")]
    run = ["--out", str(out), "--batch", "4", "--permutations", "19", "--runtime", "eager", "--seed", "3", "--geometry", "batch"]
    return [*kdx, *run, "--gallery", "6", *options]


def bytes_of(out: Path) -> dict[str, bytes]:
    """Every file of a run except those with times, and the manifest without its times and machine."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    manifest = json.loads(files["manifest.json"])
    for name in ("environment", "created", "finished", "command"):
        manifest.pop(name)
    kept = {name: content for name, content in files.items() if name not in DIFFERENT}
    return {**kept, "manifest": json.dumps(manifest, sort_keys=True).encode()}


def run(folder: Path, out: Path, geometry: GeometryName, workers: int | None) -> None:
    """workers: None computes the run in this process."""
    options = replace(OPTIONS, batch=4, geometry=geometry)
    executor = None if workers is None else RayExecutor(ClusterOptions(workers=workers, cpus_per_worker=1), uses_gpus=False)
    explain.run(str(folder / "pictures"), folder / "models.toml", out, (), options, executor=executor, announce=lambda line: None)


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_workers_write_the_bytes_of_one_process(pictures: Path, finished: dict[str, bytes], tmp_path: Path, workers: int) -> None:
    run(pictures, tmp_path / "run", "batch", workers)
    assert bytes_of(tmp_path / "run") == finished
    recorded = json.loads((tmp_path / "run" / "manifest.json").read_text())["environment"]["workers"]
    assert recorded["threads"] == 1 and 1 <= sum(recorded["hosts"].values()) <= workers


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("geometry", [pytest.param("reference", marks=[pytest.mark.slow, pytest.mark.exhaustive]), "whole"])
def test_workers_of_the_other_geometries(pictures: Path, tmp_path: Path, geometry: GeometryName) -> None:
    run(pictures, tmp_path / "two", geometry, 2)
    assert bytes_of(tmp_path / "two") == bytes_of(alone(pictures, tmp_path / "one", geometry))


@pytest.mark.usefixtures("ray")
def test_a_killed_worker_changes_nothing(
    pictures: Path, finished: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[int] = []
    killed: list[int] = []
    add, write = distributed.WorkerRecord.add, Store.write_batch

    def noted(self: distributed.WorkerRecord, facts: Facts) -> None:
        workers.append(facts["pid"])
        add(self, facts)

    def killing(self: Store, *rest: Any) -> None:
        write(self, *rest)
        if not killed:
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)

    monkeypatch.setattr(distributed.WorkerRecord, "add", noted)
    monkeypatch.setattr(Store, "write_batch", killing)
    run(pictures, tmp_path / "run", "batch", 1)
    assert killed and len(workers) == 2, "another worker takes the place of the killed one"
    assert bytes_of(tmp_path / "run") == finished


def toy_results(build: Any, count: int = 20, workers: int = 2) -> list[tuple[int, int]]:
    executor = RayExecutor(ClusterOptions(workers=workers, cpus_per_worker=1), uses_gpus=False)
    with executor.results(build, range(count), "task {}".format, lambda facts: None) as results:
        return list(results)


@pytest.mark.usefixtures("ray")
def test_a_worker_without_enough_memory_stops_the_work_after_three_attempts() -> None:
    # The result of task 4 may be on its way to the driver when the worker ends at task 5.
    with pytest.raises(KdxError, match=r"3 workers ended at task [45]") as error:
        toy_results(toy_services.Ends)
    assert "memory" in error.value.hint


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(("service", "problem"), [(toy_services.Refuses, "Image 5 is odd."), (toy_services.Unable, "The data differ.")])
def test_an_error_of_the_user_arrives_as_itself(service: Any, problem: str) -> None:
    with pytest.raises(KdxError) as error:
        toy_results(service)
    assert error.value.problem == problem and type(error.value) is KdxError


@pytest.mark.usefixtures("ray")
def test_a_bug_arrives_with_the_traceback_of_the_worker() -> None:
    with pytest.raises(ZeroDivisionError, match=r"toy_services\.py"):
        toy_results(toy_services.Fails)


@pytest.mark.usefixtures("ray")
def test_a_slow_worker_does_not_hold_up_the_others(tmp_path: Path) -> None:
    results = toy_results(toy_services.OneIsSlow(tmp_path), 80, 3)
    slow = int((tmp_path / "slow").read_text())
    of_slow = [place for place, (_, worker) in enumerate(results) if worker == slow]
    assert sorted(task for task, _ in results) == list(range(80))
    assert 0 < len(of_slow) <= 16, "it is given less than its share of 27"


def test_a_worker_that_is_larger_than_the_machine(ray: Any) -> None:
    with pytest.raises(KdxError, match="the 99 cores of a worker; the largest has 4"):
        RayCrew(ray, ClusterOptions(cpus_per_worker=99), toy_services.Toy, uses_gpus=False)


# Commands that start their own cluster. They come last, because the cluster of this module runs beside them.


def started(folder: Path, out: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """A run with a cluster that has stored one batch and is stopped until SIGCONT.

    options: the address of a running cluster, and further options.
    """
    program = sys.executable, "-P", str(Path(__file__).with_name("stopping_driver.py"))
    process = subprocess.Popen(
        command(folder, out, "--cpus-per-worker", "1", "--cluster", *options, program=program),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=one_thread() | environment,
    )
    state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert state is not None and state.si_code == os.CLD_STOPPED, process.communicate()
    return process


def children(process: int) -> dict[int, str]:
    """The processes that a process has started, with their command lines."""
    result = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(process):
                result[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
    return result


def test_a_killed_driver_leaves_no_process_and_a_run_that_resumes(pictures: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    process = started(pictures, tmp_path / "run")
    own = children(process.pid)
    own |= {pid: line for child in own for pid, line in children(child).items()}
    process.kill()
    process.wait()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "running"
    while any(Path(f"/proc/{pid}/cmdline").exists() and "ray" in line for pid, line in own.items()):
        time.sleep(0.1)
    result = subprocess.run(command(pictures, tmp_path / "run"), check=True, capture_output=True, text=True, timeout=200, env=one_thread())
    assert "Resuming" in result.stdout
    assert bytes_of(tmp_path / "run") == finished


def test_without_raylet_the_run_ends_with_an_error_and_resumes(pictures: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    process = started(pictures, tmp_path / "run")
    raylet = next(pid for pid, line in children(process.pid).items() if "raylet/raylet" in line.split("\0")[0])
    workers = [pid for pid, line in children(raylet).items() if line.startswith("ray::Worker")]
    assert workers
    for worker in workers:  # they live some seconds longer than raylet, and could complete the run
        os.kill(worker, signal.SIGSTOP)
    os.kill(raylet, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    try:
        _, errors = process.communicate()
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):  # some systems end a process with the one that started it, even if it is stopped
                os.kill(worker, signal.SIGKILL)
    assert process.returncode == 2, errors
    assert "raylet" in errors and "Traceback" not in errors
    again = command(pictures, tmp_path / "run")
    subprocess.run(again, check=True, capture_output=True, timeout=200, env=one_thread())
    assert bytes_of(tmp_path / "run") == finished


def test_ctrl_c_leaves_a_run_that_resumes(pictures: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    process = started(pictures, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate()
    assert process.returncode == 130 and errors.strip() == "Stopped. Run the same command again to resume."
    again = command(pictures, tmp_path / "run")
    subprocess.run(again, check=True, capture_output=True, timeout=200, env=one_thread())
    assert bytes_of(tmp_path / "run") == finished
