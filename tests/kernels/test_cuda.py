"""Which calls go to CUDA, and how PyCUDA is called: tested with a stand-in for its driver, because tests have no GPU."""

from __future__ import annotations

import atexit
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.kernels import cubins, cuda
from kdx.kernels.cubins import Cubin


class DriverError(Exception):
    """Stands for pycuda.driver.Error, which is not one of Python's own exceptions."""


class Driver(ModuleType):
    """The part of pycuda.driver that `kdx.kernels.cuda` uses. It records calls, which need the device's context to be current."""

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.calls: list[tuple[Any, ...]] = []
        self.current: list[int] = []
        self.Context = SimpleNamespace(pop=self.current.pop)
        self.fails = False
        self.Error = DriverError
        self.refuses = ""

    def init(self) -> None:
        if self.refuses == "init":
            raise DriverError("cuInit failed: no CUDA-capable device is detected")

    def Device(self, index: int) -> SimpleNamespace:
        context = SimpleNamespace(push=lambda: self.current.append(index), detach=lambda: self.calls.append(("detach", index)))
        return SimpleNamespace(retain_primary_context=lambda: context)

    def module_from_buffer(self, code: bytes) -> SimpleNamespace:
        device = self.current[-1]
        if self.refuses == "module":
            raise DriverError("cuModuleLoadDataEx failed: device kernel image is invalid -\nand a second line")
        self.calls.append(("module", device, code))

        def function(kernel: str) -> Callable[..., None]:
            self.calls.append(("function", device, code, kernel))

            def launch(*arguments: object, **shape: object) -> None:
                assert self.current == [device]
                if self.fails:
                    raise RuntimeError("launch failed")
                self.calls.append(("launch", device, kernel, arguments, shape))

            return launch

        return SimpleNamespace(get_function=function)

    def Stream(self, flags: int) -> SimpleNamespace:
        self.calls.append(("stream", self.current[-1], flags))
        return SimpleNamespace(handle=1000 + self.current[-1])

    def launches(self) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == "launch"]


class Stream:
    """A stream of PyTorch that records its waits."""

    waits: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(self, handle: int, device: object = None) -> None:
        self.cuda_stream = handle

    def wait_stream(self, other: Stream) -> None:
        Stream.waits.append((self.cuda_stream, other.cuda_stream))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Two GPUs, of compute capabilities 8.6 and 9.0, on which everything works."""
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 6), (9, 0))[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=(82, 132)[index]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(0))
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(cubins, "names", lambda: ["one", "two"])
    monkeypatch.setattr(cubins, "load", lambda source, capability: Cubin(f"{source} {capability}".encode(), {}))
    monkeypatch.setattr(atexit, "register", lambda function: None)
    monkeypatch.setattr(cuda, "_gpus", {})
    monkeypatch.setattr(Stream, "waits", [])
    cuda._log_once.cache_clear()
    yield driver
    assert not driver.current, "a context was left on the stack"


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


def test_arguments_are_passed_as_addresses_and_numbers(driver: Driver) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    opened().launch("one", "kernel", (7, 2, 1), (128, 1, 1), [x, x[1:], None, np.int32(3), np.float32(0.5), np.int64(-1)], 512)
    ((device, kernel, arguments, shape),) = driver.launches()
    assert (device, kernel) == (0, "kernel") and shape == {"grid": (7, 2, 1), "block": (128, 1, 1), "shared": 512}
    expected = [np.uintp(x.data_ptr()), np.uintp(x.data_ptr() + 16), np.uintp(0), np.int32(3), np.float32(0.5), np.int64(-1)]
    assert list(arguments) == expected and [type(each) for each in arguments] == [type(each) for each in expected]


def test_modules_are_loaded_once_per_device_for_its_own_architecture(driver: Driver) -> None:
    first, second = opened(0), opened(1)
    for gpu in (first, second, first):
        gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [])
        gpu.launch("one", "b", (1, 1, 1), (1, 1, 1), [])
    loaded = [call[1:] for call in driver.calls if call[0] in ("module", "function")]
    assert loaded == [
        *((0, b"one (8, 6)"), (0, b"two (8, 6)"), (1, b"one (9, 0)"), (1, b"two (9, 0)")),
        *((0, b"one (8, 6)", "a"), (0, b"one (8, 6)", "b"), (1, b"one (9, 0)", "a"), (1, b"one (9, 0)", "b")),
    ]
    assert (first.multiprocessors, second.multiprocessors) == (82, 132)
    assert cuda.launcher(torch.device("cuda", 0)) is first and cuda.launcher(torch.device("cuda")) is second  # the current device
    assert [launch[:2] for launch in driver.launches()] == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (0, "a"), (0, "b")]


def test_the_default_stream_is_launched_on_itself(driver: Driver) -> None:
    opened().launch("one", "a", (1, 1, 1), (1, 1, 1), [])
    assert "stream" not in driver.launches()[0][-1] and not Stream.waits


def test_kernel_and_another_stream_wait_for_each_other(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = opened(1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(42))
    for _ in range(2):
        gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [])
    assert [launch[-1]["stream"].handle for launch in driver.launches()] == [1001, 1001]
    assert Stream.waits == [(1001, 42), (42, 1001)] * 2
    assert [call for call in driver.calls if call[0] == "stream"] == [("stream", 1, 1)]  # it does not wait for the default stream


def test_a_failed_launch_releases_the_context(driver: Driver) -> None:
    gpu = opened()
    driver.fails = True
    with pytest.raises(RuntimeError, match="launch failed"):
        gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [])
    assert not driver.current


def test_wrong_arguments_are_programming_errors(driver: Driver) -> None:
    gpu = opened()
    with pytest.raises(ValueError, match="argument 1 is on meta, and the kernel runs on cpu"):
        gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [np.int32(1), torch.empty(1, device="meta")])
    for argument in (3, 0.5, np.bool_(True)):
        with pytest.raises(TypeError, match=r"argument 0 is a .*neither a tensor nor a NumPy number"):
            gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [cast(np.generic, argument)])
    assert not driver.launches()


def test_a_closed_launcher_releases_everything(driver: Driver) -> None:
    gpu = opened()
    gpu.launch("one", "a", (1, 1, 1), (1, 1, 1), [])
    gpu.close()
    assert not gpu._modules and not gpu._functions and gpu._stream is None and driver.calls[-1] == ("detach", 0)


# ---- choosing ----


def test_cuda_tensors_run_and_others_stay(driver: Driver) -> None:
    assert cuda.runs(tensor()) and cuda.runs(tensor(), "cuda") and not cuda.runs(tensor(), "torch")
    cpu = torch.zeros(1)
    assert not cuda.runs(cpu) and not cuda.runs(cpu, "torch")
    with pytest.raises(KdxError, match="this tensor is on cpu"):
        cuda.runs(cpu, "cuda")
    with pytest.raises(KdxError, match="this tensor is on cpu"):
        cuda.launcher(cpu.device)
    with pytest.raises(ValueError, match="auto, torch, cuda, not 'gpu'"):
        cuda.runs(tensor(), cast(Any, "gpu"))


def no_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)


def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, capability: tuple[int, int]) -> Cubin:
        raise KdxError("The CUDA kernels cannot be compiled: neither nvcc nor NVRTC is installed.", "Install one.")

    monkeypatch.setattr(cubins, "load", load)


def too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))


def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pycuda.driver"], "refuses", "init")


def older_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pycuda.driver"], "refuses", "module")


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (no_device, "The driver of cuda:0 does not load the CUDA kernels: cuInit failed: no CUDA-capable device is detected"),
        (older_driver, "cuModuleLoadDataEx failed: device kernel image is invalid -\\."),
        (no_pycuda, r"The CUDA backend needs the package pycuda(.|\n)*pip install 'kdx\[gpu\]'"),
        (no_driver, "PyCUDA does not load: libcuda.so.1: cannot open shared object file"),
        (no_compiler, "neither nvcc nor NVRTC"),
        (too_old, r"GPU 0 has compute capability 7\.0, and the CUDA kernels need 7\.5"),
    ],
)
def test_an_obstacle_is_raised_or_logged_once(
    lacking: Callable[[pytest.MonkeyPatch], None],
    message: str,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lacking(monkeypatch)
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


def test_the_obstacle_of_a_device_is_determined_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(source: str, capability: tuple[int, int]) -> Cubin:
        calls.append(source)
        raise KdxError("It does not compile.", "Fix it.")

    monkeypatch.setattr(cubins, "load", load)
    assert not cuda.runs(tensor())
    tried = list(calls)
    assert tried and not cuda.runs(tensor()) and calls == tried


def test_a_recorded_gradient_stays_in_pytorch(driver: Driver) -> None:
    recorded = tensor(requires_grad=True)
    assert not cuda.runs(recorded)
    with pytest.raises(KdxError, match="record no gradient"):
        cuda.runs(recorded, "cuda")
    with torch.no_grad():
        assert cuda.runs(recorded)


def test_a_traced_graph_stays_in_pytorch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
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
