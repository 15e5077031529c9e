"""Stand-ins for the two packages through which kdx calls the CUDA driver, since tests have no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kdx.kernels import drivers
from tests.host import declared

INVALID_IMAGE, NO_DEVICE = "device kernel image is invalid", "no CUDA-capable device is detected"


@dataclass(frozen=True)
class Launch:
    """A launch as the device would see it. arguments: (kind of number, value)."""

    device: int
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    arguments: tuple[tuple[str, float], ...]


class Package(ModuleType):
    """What both stand-ins record. Calls need the device's context to be current.

    refuses: ``init``, ``module`` or ``launch``, which then fails. compute: what a launch does. modules: (device, code) of each
    module that was loaded. functions: (device, code, kernel) of each function that was looked up.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.refuses = ""
        self.current: list[int] = []
        self.modules: list[tuple[int, bytes]] = []
        self.functions: list[tuple[int, bytes, str]] = []
        self.launches: list[Launch] = []
        self.streams: list[int] = []
        self.released: list[int] = []
        self.compute: Callable[[Launch], None] = lambda launch: None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Make this the only package that is installed."""
        parts = self.__name__.split(".")
        package = ".".join(parts[:-1])
        patch.setattr(drivers, "_installed", lambda name: name == package)
        patch.setattr(drivers, "importlib", SimpleNamespace(import_module=lambda name: {self.__name__: self}[name]))

    def _record(self, launch: Launch) -> None:
        """Record a launch and compute it. A kernel of kdx must receive the arguments that it declares; a GPU does not notice others."""
        types = tuple(kind for kind, _ in launch.arguments)
        assert declared().get(launch.kernel, types) == types, f"{launch.kernel} takes {declared()[launch.kernel]}, not {types}"
        self.launches.append(launch)
        self.compute(launch)


class PyCuda(Package):
    """pycuda.driver."""

    class Error(Exception):
        """Stands for pycuda.driver.Error, which is not one of Python's own exceptions."""

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.Context = SimpleNamespace(pop=self.current.pop)

    def init(self) -> None:
        if self.refuses == "init":
            raise self.Error(f"cuInit failed: {NO_DEVICE}")

    def Device(self, index: int) -> SimpleNamespace:
        context = SimpleNamespace(push=lambda: self.current.append(index), detach=lambda: self.released.append(index))
        return SimpleNamespace(retain_primary_context=lambda: context)

    def module_from_buffer(self, code: bytes) -> SimpleNamespace:
        device = self.current[-1]
        if self.refuses == "module":
            raise self.Error(f"cuModuleLoadDataEx failed: {INVALID_IMAGE} -\nand a second line")
        self.modules.append((device, code))

        def function(kernel: str) -> Callable[..., None]:
            self.functions.append((device, code, kernel))

            def launch(*arguments: np.generic, grid: Any, block: Any, shared: int, stream: Any = None) -> None:
                assert self.current == [device]
                if self.refuses == "launch":
                    raise self.Error("cuLaunchKernel failed: launch failed")
                values = tuple((argument.dtype.name, float(argument)) for argument in arguments)
                handle = 0 if stream is None else stream.handle
                self._record(Launch(device, kernel, grid, block, shared, handle, values))

            return launch

        return SimpleNamespace(get_function=function)

    def Stream(self, flags: int) -> SimpleNamespace:
        assert flags == 1  # it does not wait for the default stream
        self.streams.append(self.current[-1])
        return SimpleNamespace(handle=1000 + self.current[-1])


_NAMES = {
    ctypes.c_void_p: np.dtype(np.uintp).name,
    ctypes.c_int32: "int32",
    ctypes.c_int64: "int64",
    ctypes.c_float: "float32",
    ctypes.c_double: "float64",
}


class CudaBindings(Package):
    """cuda.bindings.driver, whose functions return a status before their results."""

    _STATUS = {"init": 100, "module": 200, "launch": 719}  # noqa: RUF012
    _TEXTS = {100: NO_DEVICE, 200: INVALID_IMAGE, 719: "launch failed"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")

    def _status(self, step: str) -> int:
        return self._STATUS[step] if self.refuses == step else 0

    def cuInit(self, flags: int) -> tuple[int]:
        return (self._status("init"),)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return 0, device

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[int]:
        self.released.append(device)
        return (0,)

    def cuCtxPushCurrent(self, context: int) -> tuple[int]:
        self.current.append(context)
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, int]:
        return 0, self.current.pop()

    def cuModuleLoadData(self, code: bytes) -> tuple[int, tuple[int, bytes] | None]:
        if status := self._status("module"):
            return status, None
        self.modules.append((self.current[-1], code))
        return 0, self.modules[-1]

    def cuModuleGetFunction(self, module: tuple[int, bytes], kernel: bytes) -> tuple[int, tuple[int, bytes, str]]:
        self.functions.append((*module, kernel.decode()))
        return 0, self.functions[-1]

    def cuLaunchKernel(self, function: tuple[int, bytes, str], *rest: Any) -> tuple[int]:
        device, _, kernel = function
        assert self.current == [device] and len(rest) == 10 and rest[-1] == 0
        if status := self._status("launch"):
            return (status,)
        shared, stream, (values, types) = rest[6:9]
        arguments = tuple((_NAMES[kind], float(value)) for value, kind in zip(values, types, strict=True))
        self._record(Launch(device, kernel, rest[:3], rest[3:6], shared, stream, arguments))
        return (0,)

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, self._TEXTS[status].encode()


class Stream:
    """A stream of PyTorch that records its waits."""

    waits: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(self, handle: int, device: object = None) -> None:
        self.cuda_stream = handle

    def wait_stream(self, other: Stream) -> None:
        Stream.waits.append((self.cuda_stream, other.cuda_stream))

    def synchronize(self) -> None:
        pass


def two_gpus(patch: pytest.MonkeyPatch, capabilities: Sequence[tuple[int, int]] = ((8, 6), (9, 0))) -> None:
    """Let PyTorch report two GPUs, of which the second is the current one."""
    patch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    patch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=(82, 132)[index]))
    patch.setattr(torch.cuda, "current_device", lambda: 1)
    patch.setattr(torch.cuda, "current_stream", lambda device: Stream(0))
    patch.setattr(torch.cuda, "ExternalStream", Stream)
    patch.setattr(Stream, "waits", [])
