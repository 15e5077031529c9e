"""The GPU benchmark is reliable: its checks hold on the CPU's emulation, and fail if a kernel is broken."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import benchmarks.record
from benchmarks import gpu, gpu_batch, gpu_checks, gpu_tables
from benchmarks.gpu_clock import CpuClock
from benchmarks.kernel_cases import CHECKED, IN_PYTORCH, Check, KernelCase, Sizes, cases, check
from kdx.data.gpu_decoder import GpuDecoder
from kdx.errors import KdxError
from kdx.explain.layer_graphs import LayerGraphs
from kdx.kernels import cubins, cuda, geometry
from kdx.kernels.cuda import Argument
from kdx.kernels.drivers import Size
from kdx.runtimes.transfers import Transfers
from tests.data.test_gpu_decoder import Nvjpeg
from tests.explain.test_fused_layer import captured
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


@pytest.mark.slow
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


@pytest.mark.parametrize("source", [pytest.param(source, marks=() if source == "cam" else pytest.mark.slow) for source in SOURCES])
def test_a_kernel_that_does_nothing_fails_only_its_own_checks(source: str) -> None:
    with running(Absent(source)):
        failed = {case.name for case in cases(CHECKED[0], CPU, 4) if fails(case)}
    uses = {"products": {"products", "weights"}}.get(source, {source})
    uses |= set() if source in ("imputation", "influences", "shares") else {"a"}  # the maps and products of a layer are compared
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
        result = gpu_batch.compare(student, base, target)
        weights, score, products, *maps = gpu_batch.explained(student, base, target)
    assert result.error < TOLERANCE["float32"]
    assert weights.shape == (2, 13, 9) and score.shape == (2,) and products.shape == (1, 3, 3)
    assert [cam.shape for cam in maps] == [(13, 3, 5)] * 2


def test_the_batch_with_decomposition_maps_adds_up() -> None:
    generator = torch.Generator().manual_seed(6)
    target = torch.nn.functional.one_hot(torch.arange(13) % 3).float()
    student, base = (torch.randn(13, 9, 3, 5, generator=generator) for _ in range(2))
    with running():
        without, (*same, first, second) = gpu_batch.explained(student, base, target), gpu_batch.decomposed(student, base, target)
    assert all(error(a, b) < TOLERANCE["float32"] for a, b in zip(same, without, strict=True))
    for shares, features in ((first, student), (second, base)):
        d, g = (geometry.distances(rows.flatten(1)) for rows in (features, target))
        assert float(shares.sum()) == pytest.approx(float(geometry.dot(d, geometry.u_centered(g))), rel=1e-4) and shares.shape == (13, 15)


@pytest.mark.parametrize("permutations", [0, pytest.param(999, marks=pytest.mark.slow)])
def test_the_timed_maps_and_scores_are_those_of_pytorch(permutations: int) -> None:
    batch = gpu_batch.Batch.drawn(Sizes(12, (4, 3, 3), (4, 3, 3), (16, 16), stack=1, classes=2), CPU, 3)
    transfers = Transfers(CPU)
    moved = gpu_batch.target(batch, transfers)
    expected = gpu_batch.maps_and_scores(batch, moved, permutations).result()
    with running():
        actual = gpu_batch.to_host(gpu_batch.maps_and_scores(batch, moved, permutations), transfers)
    assert error(actual.products, expected.products) < TOLERANCE["float32"]
    assert all(error(actual.maps[name], maps.maps) < TOLERANCE["float32"] for name, maps in expected.maps.items())
    assert {name: len(rows) for name, rows in actual.permuted.items()} == dict.fromkeys(expected.permuted, permutations)
    assert torch.equal(gpu_batch.upload(batch, transfers), batch.levels.float() / 255)


@pytest.mark.slow
def test_the_timed_graph_is_compared_with_single_launches() -> None:
    batch = gpu_batch.Batch.drawn(Sizes(12, (4, 3, 3), (4, 3, 3), (16, 16), stack=1, classes=2), CPU, 3)
    with running():
        samples, same = gpu_batch.graph_samples(CpuClock(1), batch, LayerGraphs(captured))
        _, other = gpu_batch.graph_samples(CpuClock(1), batch, LayerGraphs(lambda run: (captured(run)[0], lambda: None)))
    assert all(len(each) == 1 for each in samples.values()) and same.error == 0
    assert not other.holds  # a graph that computes nothing again has the results of other features


# ---- the report ----


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a toy run, in which the emulation stands for a GPU."""
    folder = tmp_path_factory.mktemp("toy")
    assert gpu.main(["--toy", "--seed", "7", "--out", str(folder)]) == 0
    written: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    assert (folder / "gpu.md").read_text() == gpu_tables.page(written)
    return written


@pytest.mark.slow
def test_a_toy_run_checks_times_and_writes(record: dict[str, Any]) -> None:
    assert record["seed"] == 7 and "emulation" in record["device"]["name"]
    assert len(record["checks"]) == len(record["kernels"]) >= 11
    assert all(result["error"] <= result["tolerance"] for result in record["checks"])
    for row in record["kernels"]:
        assert len(row["samples"]) == 1
        if row["bytes"]:
            assert row["floor"] >= row["bytes"] / record["bandwidth"]
            assert row["share"] == pytest.approx(row["floor"] / np.median(row["samples"]))
    times = record["batch"]
    assert times.pop("published images") == 12 and all(len(samples) == 1 for samples in times.values())
    assert set(times) | set(record["missing"]) == {*gpu_tables.BATCH, "published", "geometry beside published"}
    without_gpu = dict.fromkeys((gpu_batch.GRAPH, gpu_batch.GRAPH_BY_CLOCK), "CUDA graphs need a GPU")
    assert record["missing"] == {"passes, TensorRT float16": "TensorRT needs a GPU"} | without_gpu
    of_half = {name: samples for name, samples in times.items() if name.startswith("passes") and name.endswith("float16")}
    assert record["baseline"] == min(of_half, key=lambda name: of_half[name][0])
    assert [goal["wanted"] for goal in record["goals"]] == [*[0.8] * 7, 0.05, 0.05, 0.05, 1.5, 100]
    assert "needs an NVIDIA GPU" in record["decoder"]["reason"] and record["tests"] is record["command"] is None
    times["published images"] = 12


@pytest.mark.slow
def test_a_run_is_shown(record: dict[str, Any]) -> None:
    console = Console(width=140)
    with console.capture() as shown:
        gpu.show(record, console)
    text = shown.get()
    assert "emulation" in text and "GB/s" in text and text.count("wanted") == 12
    assert all(row["name"] in text for row in record["kernels"])
    assert "Tests: none were run." in text and "was not compared" in text and "TensorRT needs a GPU" in text


@pytest.mark.slow
def test_the_page_states_what_was_measured_and_what_was_not(record: dict[str, Any]) -> None:
    page = gpu_tables.page(record)
    assert page.startswith("# kdx on the emulation on a CPU\n") and "TensorFloat-32 is forbidden" in page
    assert "The same as one CUDA graph, as in `kdx explain`: not measured (CUDA graphs need a GPU)." in page
    assert (
        f"relative to the {gpu_tables.PASSES[record['baseline']].removeprefix('two forward ')}" in page
        and "TensorRT, float16: not measured (TensorRT needs a GPU)." in page
    )
    full = record | {
        "tests": {"passed": 5, "skipped": 1, "failed": ["tests/test_a.py::test_b[1]"], "seconds": 3.2, "timed out": False},
        "decoder": {"images": 8, "mean": 0.5, "99.9%": 3.0, "largest": 9.0},
        "command": {
            "case": "two networks",
            "cores": 2,
            "images_per_second": {"decoding": 1234.5},
            "commands": [{"geometry": "batch", "seconds": 2.0, "images": 100, "stages": {"decode": 1.5, "upload": 0.5}}],
        },
    }
    page = gpu_tables.page(full)
    assert "5 passed, 1 failed, 1 skipped" in page and "Failed: tests/test_a.py::test_b[1]" in page
    assert "0.50 levels on average over 8 JPEGs" in page and "| `kdx explain`, geometry batch | 50 |" in page
    assert "| decode | 1.50 | 75% |" in page and "| decoding | 1,234 |" in page
    assert "not finished after 3 s" in gpu_tables.page(full | {"tests": full["tests"] | {"timed out": True}})


@pytest.mark.parametrize("holds", [True, False])
def test_goals_are_judged_by_the_measured_values(holds: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "cam", "goal": 0.8, "share": 0.8 if holds else 0.79},
        {"name": "weights", "goal": None, "share": 0.1},
    ]
    batch = {
        "geometry": [1.0, 5.0, 9.0] if holds else [6.0],
        "geometry and decomposition maps": [7.5 if holds else 9.1],
        "maps and scores, 999 permutations": [4.0 if holds else 8.0],
        "full path": [5.0 if holds else 7.0],
        "passes, float16": [90.0, 100.0, 120.0],
        "published": [500.0],
        "geometry beside published": [5.0] if holds else [5.1],
        "published images": 64,
    }
    goals = gpu.goals(rows, batch)
    assert [goal["holds"] for goal in goals] == [holds] * 6
    assert [goal["found"] for goal in goals[1:4]] == pytest.approx([0.05, 0.04, 0.05] if holds else [0.06, 0.08, 0.07])
    assert "float16" in goals[3]["goal"]
    # The goals use the first of BASELINES that ran.
    faster = gpu.goals(rows, batch | {"passes, ONNX Runtime float16": [50.0], "passes, TensorRT float16": [20.0]})
    assert faster[3]["found"] == pytest.approx(0.25 if holds else 0.35) and "TensorRT" in faster[3]["goal"]


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


# ---- the checks besides the kernels ----


@pytest.mark.slow
def test_failing_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\ndef test_right(): pass\n\n@pytest.mark.parametrize('n', [1, 2])\ndef test_wrong(n): assert n == 1\n\n"
        "def test_left_out(): pytest.skip('no')\n\n@pytest.fixture\ndef broken(): raise OSError\n\ndef test_broken(broken): pass\n"
    )
    options = ("-n", "0", "--rootdir", str(tmp_path), "-c", "/dev/null", "-p", "no:cacheprovider")
    result = gpu_checks.run_tests([tmp_path], options=options)
    assert (result["passed"], result["skipped"], result["timed out"]) == (2, 1, False) and result["seconds"] > 0
    assert [name.partition("::")[2] for name in result["failed"]] == ["test_broken", "test_wrong[2]"]
    assert gpu_checks.run_tests([tmp_path], seconds=0.01, options=options)["timed out"]


@pytest.mark.parametrize("off", [0, 1, 3])
def test_decoders_are_compared_in_levels(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(files: list[torch.Tensor]) -> list[torch.Tensor]:
        return [(levels.clamp(10, 200) + off).to(torch.uint8) for levels in Nvjpeg()(files)]

    monkeypatch.setattr(gpu_checks, "open_gpu_decoder", lambda device: GpuDecoder(CPU, Nvjpeg() if off == 0 else decode))
    result = gpu_checks.compare_decoders(CPU, 3, 1)
    assert result["images"] == 3 and (result["mean"] < 0.02 and result["largest"] <= 1) == (off == 0)
    assert off == 0 or result["mean"] >= 0.9 * off
