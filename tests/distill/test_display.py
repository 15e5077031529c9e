"""What is shown of a training within an epoch, against losses that the test records itself."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kdx import progress
from kdx.data.dataset import open_data
from kdx.distill import EpochResult, loop
from kdx.distill.data import SplitImages
from kdx.distill.display import console_reports
from kdx.distill.settings import StepResult
from kdx.export.graphs import FeatureGraph
from tests.distill.small import Interruption
from tests.distill.test_loop import PLAIN, network, training

COUNT = 50


@pytest.fixture(scope="module")
def images() -> SplitImages:
    return SplitImages(open_data("digits"), np.arange(COUNT), (8, 8), 0.01)


def watched(images: SplitImages, seconds: float, monkeypatch: pytest.MonkeyPatch, stop_after: int = 1000) -> tuple[
    loop.Training, list[StepResult], list[tuple[int, float]]
]:  # fmt: skip
    """A training whose losses are read after this many seconds, its reports, and the number of images and the loss of every step."""
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_READINGS", seconds)
    reports, steps = list[StepResult](), list[tuple[int, float]]()
    module = network()
    graph = FeatureGraph(module, [])

    def loss(pixels: Tensor, labels: Tensor, _positions: Tensor) -> dict[str, Tensor]:
        if len(steps) == stop_after:
            raise Interruption
        value = functional.cross_entropy(graph(pixels)[0], labels)
        steps.append((len(labels), float(value.detach())))
        return {"labels": value, "twice": 2 * value}

    settings = replace(PLAIN, save_minutes=0)
    return replace(training(images, settings, module), graph=graph, loss=loss, on_step=reports.append), reports, steps


def means(steps: list[tuple[int, float]]) -> list[float]:
    """The mean loss per image of the steps up to each one."""
    return [sum(n * value for n, value in steps[:end]) / sum(n for n, _ in steps[:end]) for end in range(1, len(steps) + 1)]


def test_the_losses_within_an_epoch_are_means_over_its_images_so_far(
    images: SplitImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reports, steps = watched(images, -1, monkeypatch)
    results = list[EpochResult]()
    loop.train(run, tmp_path / "watched", results.append)
    assert [(report.epoch, report.step) for report in reports] == [(epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3, 4)]
    expected = [mean for epoch in range(3) for mean in means(steps[4 * epoch : 4 * epoch + 4])]
    assert [report.parts["labels"] for report in reports] == pytest.approx(expected)
    assert [report.loss for report in reports] == pytest.approx([3 * mean for mean in expected])
    assert [report.loss for report in reports[3::4]] == pytest.approx([result.loss for result in results])
    assert {(report.network, report.epochs, report.steps) for report in reports} == {("base", 3, 4)}
    assert all(report.images_per_second > 0 for report in reports)

    seldom, seldom_reports, _ = watched(images, 1000, monkeypatch)
    loop.train(seldom, tmp_path / "seldom", lambda result: None)
    assert seldom_reports == []
    assert (tmp_path / "seldom" / "base.safetensors").read_bytes() == (tmp_path / "watched" / "base.safetensors").read_bytes()


def test_an_epoch_that_goes_on_reports_its_losses_from_the_start(
    images: SplitImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, first, steps = watched(images, -1, monkeypatch, stop_after=2)
    with pytest.raises(Interruption):
        loop.train(run, tmp_path, lambda result: None)
    resumed, then, later = watched(images, -1, monkeypatch)
    loop.train(resumed, tmp_path, lambda result: None)
    reports = [*first, *then][:4]
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert [report.parts["labels"] for report in reports] == pytest.approx(means([*steps, *later][:4]))


class Readings(TorchDispatchMode):
    """Counts the numbers that are read from tensors, each of which would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_losses_are_read_at_intervals_only(images: SplitImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for name, seconds, is_shown in (("hidden", -1, False), ("seldom", 1000, True), ("always", -1, True)):
        run, reports, steps = watched(images, seconds, monkeypatch)
        with Readings() as readings:
            loop.train(run if is_shown else replace(run, on_step=None), tmp_path / name, lambda result: None)
        counts[name] = readings.count - len(steps)  # the loss of this test reads one number per step
    assert counts["seldom"] == counts["hidden"]
    assert counts["always"] == counts["hidden"] + 3 * len(reports)  # the total and two parts


STEP = StepResult("student", 3, 30, 40, 80, 0.5, {"labels": 0.2, "kd": 0.3}, 1312.4)


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, width: int = 160) -> str:
    """The last frame on a terminal of this width, or the lines in a file."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "console", lambda: console)
    with console_reports() as (on_epoch, on_step):
        assert (on_step is not None) == terminal
        on_epoch(EpochResult("student", 2, 30, 0.7, 0.91, 0.4, {"labels": 0.3, "kd": 0.4}, 1200.0))
        if on_step is not None:
            on_step(STEP)
        else:
            on_epoch(EpochResult("student", 30, 30, 0.1, 0.95, 0.2, {"labels": 0.1}, 1200.0))
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).split("\r")[-1].strip()


def test_half_an_epoch_is_half_a_step_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    places = list[tuple[float, int]]()

    @contextmanager
    def recorded() -> Iterator[progress.Show]:
        yield lambda task, done, total, note: places.append((done, total))

    monkeypatch.setattr(progress, "console", lambda: Console(force_terminal=True))
    monkeypatch.setattr(progress, "progress", recorded)
    with console_reports() as (on_epoch, on_step):
        assert on_step is not None
        on_step(STEP)
        on_epoch(EpochResult("student", 3, 30, 0.7))
    assert places == [(2.5, 30), (3, 30)]


def test_a_bar_moves_within_an_epoch_and_a_file_gets_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    note = "epochs, loss 0.500, validation accuracy 91.0%, 1,312 images/s, labels 0.200 + kd 0.300"
    frame = shown(monkeypatch, terminal=True)
    assert frame.startswith("student ") and f" 2/30 {note}" in frame
    assert re.search(r"\d:\d\d:\d\d$", frame)  # the time left
    narrow = shown(monkeypatch, terminal=True, width=70)
    assert narrow.startswith("student ") and "2/30 epochs, loss 0.500" in narrow and re.search(r"… \d:\d\d:\d\d$", narrow)
    assert max(map(len, narrow.splitlines())) <= 70
    assert shown(monkeypatch, terminal=False) == "student 30/30 epochs, loss 0.100, validation accuracy 95.0%, 1,200 images/s"
