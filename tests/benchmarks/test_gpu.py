"""The GPU benchmark is reliable: its checks hold on the CPU's emulation, and fail if a kernel is broken."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import benchmarks.record
from benchmarks import gpu
from benchmarks.kernel_cases import CHECKED, IN_PYTORCH, Check, KernelCase, Sizes, cases, check
from kdx.errors import KdxError
from kdx.kernels import cubins, cuda, geometry
from kdx.kernels.cuda import Argument
from kdx.kernels.drivers import Size
from tests.host import KERNELS, ORDERS, HostLauncher, KernelError, kernels, running
from tests.oracle import TOLERANCE, error

CPU = torch.device("cpu")
SOURCES = ["cam", "imputation", "influences", "means", "pairwise", "permuted", "products", "shares", "weights"]


class Recording(HostLauncher):
    """A launcher that records the kernels that it ran."""

    def __init__(self) -> None:
        super().__init__("shuffled", 1)
        self.launched: set[tuple[str, str]] = set()

    def launch(self, source: str, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared: int = 0) -> None:
        self.launched.add((source, kernel))
        super().launch(source, kernel, grid, block, arguments, shared)


def test_every_check_holds_on_the_cpu_and_every_kernel_is_reached() -> None:
    with running(Recording()) as launcher:
        for sizes in CHECKED[:2]:
            checks = [check(case) for case in cases(sizes, CPU, 1)]
            assert len(checks) == len({result.name for result in checks}) >= 11
            assert not [result for result in checks if not result.holds]
    assert isinstance(launcher, Recording) and set(cubins.names()) == set(SOURCES)
    defined = {(source, kernel) for source in SOURCES for kernel in kernels(KERNELS / f"{source}.cu")}
    not_launched = {kernel for source, kernel in defined - launcher.launched}
    assert all(kernel.endswith(("_double", "_float64")) for kernel in not_launched)  # optional kernels, which no figure measures


@pytest.mark.slow
def test_every_check_of_a_larger_batch_holds_on_the_cpu() -> None:
    with running(HostLauncher("reverse")):
        assert not [result for case in cases(CHECKED[2], CPU, 1) if not (result := check(case)).holds]


def test_the_expected_results_of_large_sizes_agree_with_the_definitions() -> None:
    for defined, closed in zip(cases(CHECKED[1], CPU, 3), cases(CHECKED[1], CPU, 3, IN_PYTORCH), strict=True):
        for expected, actual in zip(defined.expected(), closed.expected(), strict=True):
            assert error(actual, expected) < defined.tolerance, defined.name


class Absent(HostLauncher):
    """A launcher on which one source's kernels do nothing."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def launch(self, source: str, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared: int = 0) -> None:
        if source != self.source:
            super().launch(source, kernel, grid, block, arguments, shared)


def fails(case: KernelCase) -> bool:
    try:
        return not check(case).holds
    except (KdxError, KernelError):
        return True


@pytest.mark.parametrize("source", SOURCES)
def test_a_kernel_that_does_nothing_fails_only_its_own_checks(source: str) -> None:
    with running(Absent(source)):
        failed = {case.name for case in cases(CHECKED[0], CPU, 4) if fails(case)}
    uses = {"weights": {"weights"}, "products": {"products", "weights"}}.get(source, {source})
    expected = {case.name for case in cases(CHECKED[0], CPU, 4) if re.split(r"[ ,]", case.name)[0] in uses}
    assert failed == expected and expected


def test_a_kernel_without_its_barrier_fails_its_checks() -> None:
    text = (KERNELS / "cam.cu").read_text()
    broken = text.replace("__syncthreads();", "", 1)
    assert broken != text
    failed = False
    for order in ORDERS:
        with running(HostLauncher(order, changed={"cam.cu": broken})):
            failed |= any(fails(case) for case in cases(CHECKED[1], CPU, 5) if case.name == "cam, float32")
    assert failed


def test_an_error_that_is_not_a_number_does_not_hold() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    for values in ((nan, nan[1:]), (nan[1:], nan)):
        case = KernelCase("one", lambda values=values: values, lambda values=values: [torch.ones_like(value) for value in values])  # type: ignore[misc]
        assert not check(case).holds
    with pytest.raises(KdxError, match=r"The kernels are wrong here: one is off by 2\.0e-02, and 1e-03 is allowed"):
        gpu.require(Check("one", 0.02, 1e-3))


def test_the_whole_batch_agrees_with_the_published_method() -> None:
    generator = torch.Generator().manual_seed(6)
    target = torch.nn.functional.one_hot(torch.arange(13) % 3).float()
    student, base = (torch.randn(13, 9, 3, 5, generator=generator).relu() for _ in range(2))
    with running():
        result = gpu.compare(student, base, target)
        weights, score, products, *maps = gpu.explained(student, base, target)
    assert result.error < TOLERANCE["float32"]
    assert weights.shape == (2, 13, 9) and score.shape == (2,) and products.shape == (1, 3, 3)
    assert [cam.shape for cam in maps] == [(13, 3, 5)] * 2


def test_the_batch_with_decomposition_maps_adds_up() -> None:
    generator = torch.Generator().manual_seed(6)
    target = torch.nn.functional.one_hot(torch.arange(13) % 3).float()
    student, base = (torch.randn(13, 9, 3, 5, generator=generator) for _ in range(2))
    with running():
        without, (*same, first, second) = gpu.explained(student, base, target), gpu.decomposed(student, base, target)
    assert all(error(a, b) < TOLERANCE["float32"] for a, b in zip(same, without, strict=True))
    for shares, features in ((first, student), (second, base)):
        d, g = (geometry.distances(rows.flatten(1)) for rows in (features, target))
        assert float(shares.sum()) == pytest.approx(float(geometry.dot(d, geometry.u_centered(g))), rel=1e-4) and shares.shape == (13, 15)


# ---- the report ----


class CpuClock(gpu.Clock):
    def __init__(self, device: torch.device, samples: int) -> None:
        self.device, self.samples = device, samples
        self._cache_filler = torch.zeros(1000)

    def seconds(self, run: Callable[[], object]) -> list[float]:
        samples = []
        for _ in range(self.samples):
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        return samples


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a run on a batch that is small enough for the CPU, which replaces the GPU."""
    results = tmp_path_factory.mktemp("results")
    replaced: dict[str, Any] = {
        "usable_gpu": lambda: CPU,
        "Clock": CpuClock,
        "RESNET50": Sizes(12, (4, 3, 3), (4, 3, 3), (32, 32), stack=2, classes=2),
        "CHECKED": CHECKED[:1],
        "NETWORK": "kdx:resnet,width=4,depth=1,classes=5",
    }
    with pytest.MonkeyPatch.context() as patch, running():
        for name, value in replaced.items():
            patch.setattr(gpu, name, value)
        patch.setattr(benchmarks.record, "RESULTS", results)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "An emulated GPU")
        # Memory for the differences of six of the twelve images.
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=6 * 7 * 7 * 4 * 36))
        patch.setattr(cubins, "compiler", lambda: SimpleNamespace(name="nvcc", version="13.0"))
        assert gpu.main(["--samples", "1", "--seed", "7"]) == 0
    written: dict[str, Any] = json.loads((results / "gpu.json").read_text())
    return written


@pytest.mark.slow
def test_a_run_checks_times_and_writes(record: dict[str, Any]) -> None:
    assert record["seed"] == 7 and record["device"]["name"] == "An emulated GPU" and record["device"]["architecture"] == "sm_90"
    assert len(record["checks"]) == len(record["kernels"]) >= 11
    assert all(result["error"] <= result["tolerance"] for result in record["checks"])
    for row in record["kernels"]:
        assert len(row["samples"]) == 1
        if row["bytes"]:
            assert row["floor"] >= row["bytes"] / record["bandwidth"]
            assert row["share"] == pytest.approx(row["floor"] / np.median(row["samples"]))
    assert record["batch"]["published images"] == 6
    assert set(record["batch"]) == {
        *(
            "geometry",
            "geometry and decomposition maps",
            "maps and scores, 0 permutations",
            "maps and scores, 999 permutations",
            "passes, float32",
            "passes, TF32",
            "passes, float16",
        ),
        *("published images", "published", "geometry beside published"),
    }
    assert [goal["wanted"] for goal in record["goals"]] == [*[0.8] * 7, 0.05, 1.5, 100]


def test_a_run_is_shown(record: dict[str, Any]) -> None:
    console = Console(width=140)
    with console.capture() as shown:
        gpu.show(record, console)
    text = shown.get()
    assert "An emulated GPU" in text and "GB/s" in text and text.count("wanted") == 10
    assert all(row["name"] in text for row in record["kernels"])


@pytest.mark.parametrize("holds", [True, False])
def test_goals_are_judged_by_the_measured_values(holds: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "cam", "goal": 0.8, "share": 0.8 if holds else 0.79},
        {"name": "weights", "goal": None, "share": 0.1},
    ]
    batch = {
        "geometry": [1.0, 5.0, 9.0] if holds else [6.0],
        "geometry and decomposition maps": [7.5 if holds else 9.1],
        "passes, float16": [90.0, 100.0, 120.0],
        "published": [500.0],
        "geometry beside published": [5.0] if holds else [5.1],
        "published images": 64,
    }
    goals = gpu.goals(rows, batch)
    assert [goal["holds"] for goal in goals] == [holds] * 4
    assert goals[1]["found"] == pytest.approx(0.05 if holds else 0.06)


def test_without_a_gpu_it_explains_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(benchmarks.record, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "PyTorch sees none" in capsys.readouterr().err

    def launcher(device: torch.device) -> cuda.Launcher:
        raise KdxError("PyCUDA does not load.", "Install it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "launcher", launcher)
    assert gpu.main([]) == 2
    assert "PyCUDA does not load" in capsys.readouterr().err and not (tmp_path / "gpu.json").exists()
