"""Decoding by processes gives the levels and the errors of decoding by threads, and leaves no process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kdx import KdxError
from kdx.data import decoding_processes
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import Images, decoded

pytestmark = pytest.mark.skipif(not decoding_processes.available(), reason="this system does not fork")

SIZE = 9, 7
GPU = torch.device("cuda")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    generator = np.random.default_rng(0)
    for number in range(21):
        path = tmp_path / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (11 + number % 3, 10, 3), dtype=np.uint8)).save(path)
    (tmp_path / "class0" / "04.png").write_bytes(b"no image")
    return open_data(str(tmp_path))


@pytest.fixture
def without_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory needs a GPU, so the rows for one are in ordinary memory here."""
    monkeypatch.setattr("kdx.data.images._empty_rows", lambda shape, _pinned: torch.empty(shape, dtype=torch.uint8))


def batches() -> list[NDArray[np.int64]]:
    return np.array_split(np.random.default_rng(1).permutation(21), 3)


def read(dataset: Dataset, device: torch.device, workers: int) -> list[Images]:
    with decoded(dataset, batches(), SIZE, workers, device) as images:
        return list(images)


@pytest.mark.usefixtures("without_pinned_memory")
@pytest.mark.parametrize("workers", [2, 3])
def test_processes_decode_what_threads_decode(dataset: Dataset, workers: int) -> None:
    for actual, expected in zip(read(dataset, GPU, workers), read(dataset, torch.device("cpu"), 1), strict=True):
        assert torch.equal(actual.rows, expected.rows) and torch.equal(actual.levels, expected.levels)
        assert np.array_equal(actual.kept, expected.kept) and np.array_equal(actual.readable, expected.readable)
        assert actual.unreadable == expected.unreadable
    assert not multiprocessing.active_children()


def test_a_process_that_ends_is_an_error_and_no_process_is_left(dataset: Dataset) -> None:
    def ends(indices: NDArray[np.int64], _: NDArray[np.uint8]) -> list[str]:
        if indices[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return [""] * len(indices)

    with decoding_processes.started(ends, SIZE, 2) as decode:
        levels = np.empty((1, 3, *SIZE), np.uint8)
        assert decode(np.array([1]), levels) == [""]
        with pytest.raises(KdxError, match="process that decodes images has ended"):
            decode(np.array([3]), levels)
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("without_pinned_memory")
def test_a_process_of_a_study_decodes_with_threads(dataset: Dataset) -> None:
    """It is a daemon, and daemons cannot start processes in Python."""

    def read_all() -> None:
        assert sum(len(images.kept) for images in read(dataset, GPU, 2)) == 20

    process = multiprocessing.get_context("fork").Process(target=read_all, daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.usefixtures("without_pinned_memory")
def test_threads_decode_where_the_system_allows_no_more_processes(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Limited(decoding_processes._Process):
        def __init__(self, *arguments: Any) -> None:
            if multiprocessing.active_children():
                raise BlockingIOError(11, "Resource temporarily unavailable")
            super().__init__(*arguments)

    monkeypatch.setattr(decoding_processes, "_Process", Limited)
    assert sum(len(images.kept) for images in read(dataset, GPU, 3)) == 20
    assert "decoded by threads" in caplog.text and not multiprocessing.active_children()


def test_a_signal_to_all_processes_ends_them_without_a_message(capfd: pytest.CaptureFixture[str]) -> None:
    """A scheduler sends SIGTERM to the parent, whose handler raises an exception, and to the processes."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with decoding_processes.started(lambda indices, _: [""] * len(indices), SIZE, 2) as decode:
            decode(np.array([0]), np.empty((1, 3, *SIZE), np.uint8))
            children = multiprocessing.active_children()
            for child in children:
                assert child.pid is not None
                os.kill(child.pid, signal.SIGTERM)
            for child in children:
                child.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(children) == 2 and capfd.readouterr() == ("", "")


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """They hold copies of the parent's open files, such as the lock of a run's folder, which another process may need."""

    def decode(indices: NDArray[np.int64], _: NDArray[np.uint8]) -> list[str]:
        (tmp_path / str(os.getpid())).touch()
        return [""] * len(indices)

    parent = os.fork()
    if parent == 0:
        with decoding_processes.started(decode, SIZE, 2) as in_a_process:
            for _ in range(2):
                in_a_process(np.array([0]), np.empty((1, 3, *SIZE), np.uint8))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == 2
    end = time.monotonic() + 20
    while any(_runs(child) for child in children):
        assert time.monotonic() < end
        time.sleep(0.01)


def _runs(process: int) -> bool:
    """Whether a process runs. A zombie, which has ended but whose status its parent has not read yet, does not run."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
