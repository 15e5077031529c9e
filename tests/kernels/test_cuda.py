"""Which calls go to CUDA, and how the driver is called: tested with stand-ins for its packages, because tests have no GPU."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.kernels import cubins, cuda, drivers
from kdx.kernels.cubins import Cubin
from tests.kernels.stand_ins import CudaBindings, Package, PyCuda, Stream, two_gpus


@pytest.fixture(params=[PyCuda, CudaBindings])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Two GPUs, of compute capabilities 8.6 and 9.0, on which everything works, through one of the two packages."""
    package: Package = request.param()
    package.install(monkeypatch)
    two_gpus(monkeypatch)
    monkeypatch.setattr(cubins, "names", lambda: ["one", "two"])
    monkeypatch.setattr(cubins, "load", lambda source, capability: Cubin(f"{source} {capability}".encode(), {}))
    monkeypatch.setattr(atexit, "register", lambda function: None)
    monkeypatch.setattr(cuda, "_gpus", {})
    cuda._log_once.cache_clear()
    yield package
    assert not package.current, "a context was left on the stack"


def tensor(index: int = 0, requires_grad: bool = False) -> Tensor:
    """The attributes of a tensor that `runs` reads."""
    return cast(Tensor, SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), requires_grad=requires_grad))


def opened(index: int = 0) -> cuda.Gpu:
    """A launcher that accepts CPU tensors."""
    gpu = cuda.launcher(torch.device("cuda", index))
    assert isinstance(gpu, cuda.Gpu)
    gpu.device = torch.device("cpu")
    return gpu


# ---- launching ----


def test_arguments_are_passed_as_addresses_and_numbers(package: Package) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    numbers: list[np.generic] = [np.int32(3), np.float32(0.5), np.int64(-1), np.float64(0.25)]
    opened().launch("one", "kernel", (7, 2, 1), (128, 1, 1), [x, x[1:], None, *numbers], 512)
    (launch,) = package.launches
    assert (launch.device, launch.kernel, launch.grid, launch.block, launch.shared) == (0, "kernel", (7, 2, 1), (128, 1, 1), 512)
    address = np.dtype(np.uintp).name
    addresses = ((address, x.data_ptr()), (address, x.data_ptr() + 16), (address, 0))
    assert launch.arguments == (*addresses, ("int32", 3), ("float32", 0.5), ("int64", -1), ("float64", 0.25))


def test_modules_are_loaded_once_per_device_for_its_own_architecture(package: Package) -> None:
    first, second = opened(0), opened(1)
    for gpu in (first, second, first):
        gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [])
        gpu.launch("one", "b", (1, 1, 1), (1, 1, 1), [])
    assert package.modules == [(0, b"one (8, 6)"), (0, b"two (8, 6)"), (1, b"one (9, 0)"), (1, b"two (9, 0)")]
    assert package.functions == [(0, b"one (8, 6)", "a"), (0, b"one (8, 6)", "b"), (1, b"one (9, 0)", "a"), (1, b"one (9, 0)", "b")]
    assert (first.multiprocessors, second.multiprocessors) == (82, 132)
    assert cuda.launcher(torch.device("cuda", 0)) is first and cuda.launcher(torch.device("cuda")) is second  # the current device
    launches = [(launch.device, launch.kernel) for launch in package.launches]
    assert launches == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (0, "a"), (0, "b")]


def test_the_default_stream_is_launched_on_itself(package: Package) -> None:
    opened().launch("one", "a", (1, 1, 1), (1, 1, 1), [])
    assert package.launches[0].stream == 0 and not package.streams and not Stream.waits


def test_a_kernel_runs_between_what_was_queued_before_and_after_it(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = opened(1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(42))
    for _ in range(2):
        gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [])
    streams = [launch.stream for launch in package.launches]
    if isinstance(package, CudaBindings):
        assert streams == [42, 42] and not Stream.waits
    else:  # a stream of its own, which waits for PyTorch's, and PyTorch's for it
        assert streams == [1001, 1001] and Stream.waits == [(1001, 42), (42, 1001)] * 2 and package.streams == [1]


def test_a_failed_launch_releases_the_context(package: Package) -> None:
    gpu = opened()
    package.refuses = "launch"
    with pytest.raises(Exception, match="cuLaunchKernel failed: launch failed"):
        gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [])
    assert not package.current


def test_wrong_arguments_are_programming_errors(package: Package) -> None:
    gpu = opened()
    with pytest.raises(ValueError, match="argument 1 is on meta, and the kernel runs on cpu"):
        gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [np.int32(1), torch.empty(1, device="meta")])
    for argument in (3, 0.5, np.bool_(True)):
        with pytest.raises(TypeError, match=r"argument 0 is a .*neither a tensor nor a NumPy number"):
            gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [cast(np.generic, argument)])
    assert not package.launches


def test_a_closed_launcher_releases_everything(package: Package) -> None:
    gpu = opened()
    gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [])
    gpu.close()
    assert not gpu._modules and not gpu._functions and package.released == [0]


# ---- choosing ----


def test_cuda_tensors_run_and_others_stay(package: Package) -> None:
    assert cuda.runs(tensor()) and cuda.runs(tensor(), "cuda") and not cuda.runs(tensor(), "torch")
    cpu = torch.zeros(1)
    assert not cuda.runs(cpu) and not cuda.runs(cpu, "torch")
    with pytest.raises(KdxError, match="this tensor is on cpu"):
        cuda.runs(cpu, "cuda")
    with pytest.raises(KdxError, match="this tensor is on cpu"):
        cuda.launcher(cpu.device)
    with pytest.raises(ValueError, match="auto, torch, cuda, not 'gpu'"):
        cuda.runs(tensor(), cast(Any, "gpu"))


def no_package(package: Package, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(drivers, "_installed", lambda name: False)


def no_library(package: Package, patch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libcuda.so.1: cannot open shared object file")

    patch.setattr(drivers, "importlib", SimpleNamespace(import_module=broken))


def damaged_bindings(package: Package, patch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise AttributeError("module 'cuda' has no attribute 'bindings'")

    patch.setattr(drivers, "importlib", SimpleNamespace(import_module=broken))


def broken_loader(package: Package, patch: pytest.MonkeyPatch) -> None:
    def load(source: str, capability: tuple[int, int]) -> Cubin:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    patch.setattr(cubins, "load", load)


def broken_pytorch(package: Package, patch: pytest.MonkeyPatch) -> None:
    def properties(index: int) -> None:
        raise RuntimeError("CUDA error: system not yet initialized\nCompile with TORCH_USE_CUDA_DSA")

    patch.setattr(torch.cuda, "get_device_properties", properties)


def no_compiler(package: Package, patch: pytest.MonkeyPatch) -> None:
    def load(source: str, capability: tuple[int, int]) -> Cubin:
        raise KdxError("The CUDA kernels cannot be compiled: neither nvcc nor NVRTC is installed.", "Install one.")

    patch.setattr(cubins, "load", load)


def too_old(package: Package, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))


def no_device(package: Package, patch: pytest.MonkeyPatch) -> None:
    package.refuses = "init"


def older_driver(package: Package, patch: pytest.MonkeyPatch) -> None:
    package.refuses = "module"


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (no_device, "The driver of cuda:0 does not load the CUDA kernels: cuInit failed: no CUDA-capable device is detected"),
        (older_driver, "cuModuleLoadData(Ex)? failed: device kernel image is invalid( -)?\\."),
        (no_package, r"The CUDA backend needs the package cuda-bindings(.|\n)*pip install 'kdx\[gpu\]'"),
        (no_library, r"(pycuda|cuda.bindings).driver does not load: libcuda.so.1: cannot open shared object file"),
        (damaged_bindings, r"driver does not load: module 'cuda' has no attribute 'bindings'\."),
        (broken_loader, r"do not start on cuda:0: OSError: libnvrtc\.so\.13: cannot open shared object file"),
        (broken_pytorch, r"do not start on cuda:0: RuntimeError: CUDA error: system not yet initialized\."),
        (no_compiler, "neither nvcc nor NVRTC"),
        (too_old, r"GPU 0 has compute capability 7\.0, and the CUDA kernels need 7\.5"),
    ],
)
def test_an_obstacle_is_raised_or_logged_once(
    lacking: Callable[[Package, pytest.MonkeyPatch], None],
    message: str,
    package: Package,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lacking(package, monkeypatch)
    with caplog.at_level(logging.WARNING, "kdx"):
        assert not cuda.runs(tensor()) and not cuda.runs(tensor())
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("PyTorch in place of the CUDA kernels on cuda:0: ")
    for _ in range(2):
        with pytest.raises(KdxError, match=message) as raised:
            cuda.runs(tensor(), "cuda")
        assert raised.value.problem in line and raised.value.hint
        with pytest.raises(KdxError, match=message):
            cuda.launcher(tensor().device)


def test_a_pycuda_that_does_not_load_leaves_the_driver_to_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = CudaBindings()

    def import_module(name: str) -> object:
        if name == "pycuda.driver":
            raise ImportError("pycuda was built for another Python")
        return bindings

    monkeypatch.setattr(drivers, "_installed", lambda name: True)
    monkeypatch.setattr(drivers, "importlib", SimpleNamespace(import_module=import_module))
    assert isinstance(drivers.open_driver(0), drivers.CudaBindings)
    monkeypatch.setattr(drivers, "_installed", lambda name: name == "pycuda")
    with pytest.raises(KdxError, match=r"pycuda\.driver does not load: pycuda was built for another Python"):
        drivers.open_driver(0)


def test_the_obstacle_of_a_device_is_determined_once(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(source: str, capability: tuple[int, int]) -> Cubin:
        calls.append(source)
        raise KdxError("It does not compile.", "Fix it.")

    monkeypatch.setattr(cubins, "load", load)
    assert not cuda.runs(tensor())
    tried = list(calls)
    assert tried and not cuda.runs(tensor()) and calls == tried


def test_a_recorded_gradient_stays_in_pytorch(package: Package) -> None:
    recorded = tensor(requires_grad=True)
    assert not cuda.runs(recorded)
    with pytest.raises(KdxError, match="record no gradient"):
        cuda.runs(recorded, "cuda")
    with torch.no_grad():
        assert cuda.runs(recorded)


def test_a_traced_graph_stays_in_pytorch(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not cuda.runs(tensor())
    with pytest.raises(KdxError, match="traced"):
        cuda.runs(tensor(), "cuda")


def test_choosing_can_itself_be_traced() -> None:
    """A function that checks for CUDA is exported as its PyTorch path."""

    class Doubled(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3 if cuda.runs(x) else x * 2

    x = torch.ones(3)
    for strict in (True, False):
        assert torch.equal(torch.export.export(Doubled(), (x,), strict=strict).module()(x), x * 2)
