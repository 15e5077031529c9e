"""The trials of the CUDA kernels in `kdx doctor`, with stand-ins for the compilers and for the packages of the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdx.commands import doctor, doctor_kernels
from kdx.commands.doctor import Finding, probe
from kdx.errors import KdxError
from kdx.kernels import compilers, cubins, drivers
from kdx.kernels.cubins import Cubin
from tests.kernels.stand_ins import CudaBindings, Launch, Package, PyCuda, two_gpus

RUNS = "a kernel loads, runs and gives the right result"


def centred(launch: Launch) -> None:
    """The kernel products_centred on the CPU."""
    assert launch.kernel == "products_centred"
    distances, rows, totals, n, result = (int(value) for _, value in launch.arguments)
    assert launch.grid == (1, n, 1)
    d, sums, total = (
        np.ctypeslib.as_array((ctypes.c_double * count).from_address(address))
        for address, count in ((distances, n * n), (rows, n), (totals, 1))
    )
    values = d.reshape(n, n) - (sums[:, None] + sums) / (n - 2) + total / ((n - 1) * (n - 2))
    np.fill_diagonal(values, 0)
    np.ctypeslib.as_array((ctypes.c_double * (n * n)).from_address(result))[:] = values.reshape(-1)


@pytest.fixture(params=[PyCuda, CudaBindings])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """A GPU on which everything works through one of the packages; its memory is the CPU's."""
    package: Package = request.param()
    package.compute = centred
    package.install(monkeypatch)
    two_gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(doctor_kernels, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(cubins, "load", lambda source, capability: Cubin(f"{source} {capability}".encode(), {}))
    yield package
    assert not package.current and package.released == [0] * len(package.released)


class FakeCompiler:
    name, version = "fake", "1.0"
    architectures: tuple[str, ...] = ("sm_80", "sm_90")

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        return f"{source.name} for {architecture}".encode(), ""


def launcher_finding(package: Package) -> Finding:
    return doctor._guarded("a launcher", lambda: doctor_kernels.try_launcher(package.__name__.rpartition(".")[0]), "")


def compiler_finding(compiler: Callable[[], compilers.Compiler], monkeypatch: pytest.MonkeyPatch) -> Finding:
    monkeypatch.setitem(compilers.COMPILERS, "fake", compiler)
    return doctor._guarded("a compiler", lambda: doctor_kernels.try_compiler("fake"), "")


def test_each_launcher_runs_the_kernel(package: Package) -> None:
    assert launcher_finding(package) == Finding("a launcher", True, RUNS)
    assert package.modules == [(0, b"products (9, 0)")] and len(package.launches) == 1 and package.released == [0]


@pytest.mark.parametrize(
    ("refused", "problem", "hint"),
    [
        ("init", "open: cuInit failed: no CUDA-capable device is detected", "CUDA_VISIBLE_DEVICES"),
        ("module", "load: cuModuleLoadData", "Update the NVIDIA driver"),
        ("launch", "launch: cuLaunchKernel failed: launch failed", "nvidia-smi"),
        ("nothing", "compare: the centred distances of 300 points are off by", "report this"),
        ("wrong", "compare: the centred distances of 300 points are off by", "report this"),
    ],
)
def test_a_step_that_fails_is_named_with_its_fix(refused: str, problem: str, hint: str, package: Package) -> None:
    def wrong(launch: Launch) -> None:
        centred(launch)
        ctypes.c_double.from_address(int(launch.arguments[4][1])).value += 1e-6

    if refused in ("nothing", "wrong"):
        package.compute = wrong if refused == "wrong" else lambda launch: None
    else:
        package.refuses = refused
    finding = launcher_finding(package)
    assert not finding.works and finding.result.startswith(problem) and hint in finding.hint


def test_a_launcher_that_does_not_load_or_has_no_code_is_reported(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(source: str, capability: tuple[int, int]) -> Cubin:
        raise KdxError("Nothing here compiles.", "Install a compiler.")

    monkeypatch.setattr(cubins, "load", none)
    assert launcher_finding(package) == Finding("a launcher", False, "compile: Nothing here compiles", "Install a compiler.")
    monkeypatch.setattr(cubins, "load", lambda source, capability: Cubin(b"code", {}))

    def broken(name: str) -> object:
        raise OSError("libcuda.so.1: cannot open")

    monkeypatch.setattr(drivers, "importlib", SimpleNamespace(import_module=broken))
    finding = launcher_finding(package)
    assert not finding.works and finding.result.startswith("open: ") and "libcuda.so.1" in finding.result and "driver" in finding.hint


def test_each_compiler_compiles_the_kernel_that_runs(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_finding(FakeCompiler, monkeypatch).result == "1.0, a kernel for sm_90 compiles, loads, runs and gives the right result"
    assert package.modules == [(0, b"products.cu for sm_90")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (12, 0))
    assert "a kernel for compute_90 compiles" in compiler_finding(FakeCompiler, monkeypatch).result
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    finding = compiler_finding(FakeCompiler, monkeypatch)
    assert finding.result.startswith("compile: fake 1.0 supports neither sm_75") and "CUDA toolkit" in finding.hint


def test_a_compiler_that_fails_is_reported(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(FakeCompiler):
        def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
            raise KdxError("nvcc cannot compile products.cu: there is no C++ compiler.", "Install one.")

    def absent() -> compilers.Compiler:
        raise KdxError("It is not installed.", "Install it.")

    finding = compiler_finding(Failing, monkeypatch)
    assert finding == Finding("a compiler", False, "compile: nvcc cannot compile products.cu: there is no C++ compiler", "Install one.")
    assert compiler_finding(absent, monkeypatch) == Finding("a compiler", False, "It is not installed", "Install it.")


def test_without_a_gpu_a_compiler_lists_its_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compiler_finding(FakeCompiler, monkeypatch) == Finding("a compiler", True, "1.0, compiles for sm_80, sm_90")
    finding = doctor._guarded("a launcher", lambda: doctor_kernels.try_launcher("pycuda"), "")
    assert not finding.works and finding.result == "PyTorch sees no GPU"


def test_every_compiler_and_launcher_has_a_finding() -> None:
    names = {finding.name for finding in probe()}
    assert {f"CUDA compiler: {name}" for name in compilers.COMPILERS} | {"cuda-bindings", "PyCUDA"} <= names
