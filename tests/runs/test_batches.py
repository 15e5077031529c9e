"""The loop over batches: one upload for all networks, a batch queued before the previous one is read, and errors that name their batch."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdx
from kdx import KdxError
from kdx.explain.batch_target import BatchTarget
from kdx.explain.explainer import Explainer
from kdx.explain.layer import LayerMeasurement, PendingMeasurement, begin
from kdx.explain.networks import NetworkRunners
from kdx.runs.collected import predictions
from kdx.runs.run import RunOptions
from kdx.runs.store import Store
from kdx.runtimes.transfers import Download, Transfers, packed, replaced, tensors_of
from tests.device_work import counted
from tests.runs import small_run
from tests.runs.small_run import results, same

OPTIONS, WHOLE = (replace(options, device="cpu") for options in (small_run.OPTIONS, small_run.WHOLE))
"""Stand-ins take the place of a GPU, also on a machine that has one."""


def run(folder: Path, out: Path, options: RunOptions = OPTIONS) -> Path:
    return small_run.run(folder, out, options)


class Recorder:
    """Transfers as on a GPU, with one batch ahead. Records in order what is uploaded, run, queued for the host, and read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        counts: Counter[str] = Counter()

        def record(name: str) -> None:
            self.events.append((name, counts[name]))
            counts[name] += 1

        original, infer, write = Transfers.upload, NetworkRunners._infer, Store.write_batch

        def upload(transfers: Transfers, tensor: Tensor) -> Tensor:
            record("upload of images")
            return original(transfers, tensor)

        def upload_together(_: Transfers, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            record("upload of target")
            return tensors

        def passes(runners: NetworkRunners, images: Tensor) -> Any:
            record("passes")
            return infer(runners, images)

        def download(_: Transfers, content: Any) -> Download[Any]:
            number = counts["queued"]
            record("queued")

            def wait() -> Any:
                self.events.append(("read", number))
                return content

            return Download(wait)

        def write_batch(store: Store, batch: int, *rest: Any) -> None:
            self.events.append(("written", batch))
            write(store, batch, *rest)

        patches = {"upload": upload, "upload_together": upload_together, "download": download, "ahead": 1}
        for name, value in patches.items():
            monkeypatch.setattr(Transfers, name, value)
        monkeypatch.setattr(NetworkRunners, "_infer", passes)
        monkeypatch.setattr(Store, "write_batch", write_batch)

    def of(self, *names: str) -> list[tuple[str, int]]:
        return [event for event in self.events if event[0] in names]


def test_a_batch_is_queued_before_the_previous_one_is_read_and_stored(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    run(folder, tmp_path / "run")
    expected = [("queued", 0)]
    for number in range(1, 4):
        expected += [("queued", number), ("read", number - 1)]
    assert recorder.of("queued", "read") == [*expected, ("read", 3)]
    assert recorder.of("written") == [("written", number) for number in range(4)]
    assert same(results(tmp_path / "run"), results(finished))


def test_images_are_uploaded_once_for_three_networks_and_the_target_before_the_passes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    run(folder, tmp_path / "run")
    assert len(recorder.of("upload of images")) == len(recorder.of("passes")) == 4
    batch: list[str] = []
    for name, _ in recorder.of("upload of images", "upload of target", "passes"):
        batch.append(name)
        if name == "passes":  # everything is uploaded before the passes
            assert batch.count("upload of images") == 1 and batch.count("upload of target") == 1
            batch.clear()
    assert not batch


@pytest.mark.slow
def test_parts_of_the_whole_set_are_also_queued_ahead(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, tmp_path / "plain", WHOLE)
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        run(folder, tmp_path / "run", WHOLE)
    parts = [event for event in recorder.events if event[0] in ("queued", "read", "upload of images")][2:]  # the first is a blank image
    assert [name for name, _ in parts[-5:]] == ["queued", "upload of images", "queued", "read", "read"]
    assert same(results(tmp_path / "run"), results(tmp_path / "plain"))


class Conversions(TorchDispatchMode):
    """Counts the operators that make floating-point pixels of levels."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        is_levels = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.uint8 and args[0].numel() == self.size
        self.count += is_levels and func.overloadpacket.__name__ == "_to_copy"
        return func(*args, **(kwargs or {}))


@contextmanager
def opened(folder: Path, roles: Sequence[str]) -> Iterator[Explainer]:
    file = kdx.models.read_models(folder / "models.toml")
    settings: dict[str, Any] = {role: file.load(role) for role in roles} | {"runtime": "eager", "device": "cpu"}
    with Explainer(**settings, layers=file.layers, permutations=9) as explainer:
        yield explainer


@pytest.mark.parametrize("roles", [("student",), ("student", "base"), ("student", "base", "teacher")])
def test_levels_become_pixels_once_for_any_number_of_networks(folder: Path, roles: tuple[str, ...]) -> None:
    levels = torch.randint(0, 256, (8, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen: list[int] = []
    with opened(folder, roles) as explainer:
        explainer.open((12, 12))
        runners = explainer._networks._runners  # type: ignore[attr-defined]
        for runner in runners.values():
            infer = runner.infer

            def recorded(images: Tensor, infer: Any = infer) -> Any:
                seen.append(images.data_ptr())
                return infer(images)

            runner.infer = recorded
        with Conversions(levels.numel()) as conversions:
            explainer.explain(levels, torch.arange(8) % 3)
    assert conversions.count == 1
    assert len(seen) == len(roles) and len(set(seen)) == 1  # all networks read the same memory


def test_nothing_waits_between_two_batches(folder: Path) -> None:
    """From the levels of a batch to its packed results, no operator reads a result, and each network and layer adds few launches."""
    levels = torch.randint(0, 256, (16, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    target = BatchTarget.of(torch.arange(16) % 3, 9, 0)

    def step(explainer: Explainer) -> None:
        logits, pending = explainer.begin(levels, target)
        results = (predictions(logits), {layer: measurement.expected for layer, measurement in pending.items()})
        packed(list(tensors_of((results, {layer: measurement.numbers for layer, measurement in pending.items()}))))

    with opened(folder, ("student", "base")) as explainer:
        with counted():
            step(explainer)  # checks the networks, and copies small constants to the device
        with counted() as work:
            step(explainer)
    assert not work.waits, work.by_line()
    assert work.launches.total() <= 2 * 51 + 80, work.by_line()


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_error_names_its_batch_and_earlier_batches_are_stored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    calls = 0
    infer = NetworkRunners._infer

    def broken(runners: NetworkRunners, images: Tensor) -> Any:
        nonlocal calls
        calls += 1
        outputs = infer(runners, images)
        if calls == 3:
            outputs["student"].features["layer3"][1] = torch.nan
        return outputs

    monkeypatch.setattr(Transfers, "ahead", ahead)
    monkeypatch.setattr(NetworkRunners, "_infer", broken)
    problem = r"^Batch 2 of 4, whose first image is \w+/\d+\.png: The student's features are not finite in rows 1\b"
    with pytest.raises(KdxError, match=problem):
        run(folder, tmp_path / "run")
    assert len(list((tmp_path / "run" / "progress").glob("*.npz"))) == 2


class Late:
    """A stand-in for `begin` on a GPU: its expected results are wrong for one batch, and a check is read later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: int, error: KdxError | None) -> None:
        self.calls = 0

        def pending(*arguments: Any, **options: Any) -> PendingMeasurement:
            number, self.calls = self.calls // 2, self.calls + 1  # two layers
            right = begin(*arguments, **options).result()
            if number != batch:
                return PendingMeasurement(torch.tensor([number]), right, lambda numbers: self._check(numbers, number, right))
            wrong = replaced(right, (torch.full_like(tensor, torch.nan) for tensor in tensors_of(right)))

            def late(_: Sequence[float]) -> Any:
                if error is not None:
                    raise error
                return right

            return PendingMeasurement(torch.tensor([number]), wrong, late)

        monkeypatch.setattr("kdx.explain.networks.begin", pending)

    @staticmethod
    def _check(numbers: Sequence[float], number: int, right: LayerMeasurement) -> LayerMeasurement:
        assert numbers == [number]  # each batch reads its own numbers
        return right


@pytest.mark.parametrize(("ahead", "batch"), [(0, 1), (1, 1), (1, 3)])
def test_an_error_that_is_known_late_names_its_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int, batch: int
) -> None:
    monkeypatch.setattr(Transfers, "ahead", ahead)
    Late(monkeypatch, batch, KdxError("The features are constant.", "Check them."))
    with pytest.raises(KdxError, match=rf"^Batch {batch} of 4, whose first image is \w+/\d+\.png: The features are constant"):
        run(folder, tmp_path / "run")
    assert len(list((tmp_path / "run" / "progress").glob("*.npz"))) == batch


@pytest.mark.slow
def test_features_are_freed_when_their_results_have_been_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features: list[weakref.ref[Tensor]] = []
    alive: list[list[int]] = []

    def pending(maps: Mapping[str, Tensor], *arguments: Any, **options: Any) -> PendingMeasurement:
        alive.append([place // 2 for place, feature in enumerate(features) if feature() is not None])
        features.append(weakref.ref(maps["student"]))
        measurement = begin(maps, *arguments, **options).result()

        def again(_: Sequence[float], kept: Mapping[str, Tensor] = maps) -> LayerMeasurement:
            return measurement

        return PendingMeasurement(torch.zeros(1), measurement, again)

    monkeypatch.setattr(Transfers, "ahead", 1)
    monkeypatch.setattr("kdx.explain.networks.begin", pending)
    run(folder, tmp_path / "run")
    # Two layers: of the batch itself the first, and of the batch before it both.
    assert alive == [[], [0], [0, 0], [0, 0, 1], [1, 1], [1, 1, 2], [2, 2], [2, 2, 3]]


def test_a_batch_that_is_measured_again_replaces_its_expected_results(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transfers, "ahead", 1)
    Late(monkeypatch, 2, None)
    run(folder, tmp_path / "run")
    assert same(results(tmp_path / "run"), results(finished))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["0", "1"])
@pytest.mark.parametrize("options", [OPTIONS, WHOLE], ids=["batch", "whole"])
def test_a_run_on_a_gpu_repeats_bit_for_bit_and_has_the_maps_of_the_cpu(
    folder: Path, tmp_path: Path, options: RunOptions, graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that another stream overtakes would change some of the results."""
    monkeypatch.setenv("KDX_CUDA_GRAPHS", graphs)
    for name, device in (("cpu", "cpu"), ("first", "cuda"), ("second", "cuda")):
        run(folder, tmp_path / name, replace(options, device=device, workers=2))
    cpu, first, second = (results(tmp_path / name) for name in ("cpu", "first", "second"))
    assert same(first, second)
    for name, expected in cpu.items():
        if isinstance(expected, np.ndarray):
            assert np.abs(first[name] - expected).max() <= 1e-3 * np.abs(expected).max(), name
