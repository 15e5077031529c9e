"""The CUDA driver, through PyCUDA or through cuda-bindings: loads machine code and launches kernels in PyTorch's context.

PyTorch's CUDA builds bring cuda-bindings. PyCUDA is chosen where it is installed; it has no wheels, and its build needs a CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from kdx.errors import KdxError, first_line, missing_package

Size = tuple[int, int, int]
Number = np.number[Any]

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: a stream that does not wait for the default stream."""

_TYPES: dict[type[np.generic], Any] = {
    np.uintp: ctypes.c_void_p,
    np.int32: ctypes.c_int32,
    np.int64: ctypes.c_int64,
    np.float32: ctypes.c_float,
    np.float64: ctypes.c_double,
}
"""The C types of a kernel's arguments; addresses are ``np.uintp``."""


class DriverError(Exception):
    """What the driver answers if it does not do what it was told."""


class Driver(Protocol):
    """One device. All methods run in the context that PyTorch uses."""

    def load(self, code: bytes) -> Any:
        """The module of some machine code. Raises DriverError."""
        ...

    def function(self, module: Any, kernel: str) -> Any:
        """A kernel of a module."""
        ...

    def launch(self, function: Any, grid: Size, block: Size, shared: int, arguments: Sequence[Number], stream: int) -> None:
        """Launch a kernel on one of PyTorch's streams, which is given by its address."""
        ...

    def close(self) -> None:
        """Release the context."""
        ...


def open_driver(index: int) -> Driver:
    """The driver of the device ``index``, by the first package of `DRIVERS` that is installed and loads.

    Raises KdxError if neither is installed or none loads, and DriverError if the driver refuses the device.
    """
    problems: list[KdxError] = []
    for package, driver in DRIVERS.items():
        if _installed(package):
            try:
                return driver(index)
            except KdxError as problem:
                problems.append(problem)
    raise problems[0] if problems else missing_package("cuda-bindings", "gpu", "The CUDA backend")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is not installed
        return False


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # ImportError without the driver's library, and anything from a broken package
        raise KdxError(
            f"{module} does not load: {first_line(error)}.", "Install the NVIDIA driver; kdx doctor shows what is missing."
        ) from error


class PyCuda:
    """The driver through PyCUDA, which launches only on the default stream and on streams that it has made itself."""

    def __init__(self, index: int) -> None:
        self._driver = _imported("pycuda.driver")
        self._index = index
        self._stream: tuple[Any, torch.cuda.Stream] | None = None  # one stream, as PyCUDA and as PyTorch name it
        self._context = self._checked(self._open)

    def load(self, code: bytes) -> Any:
        with self._current():
            return self._checked(self._driver.module_from_buffer, code)

    def function(self, module: Any, kernel: str) -> Any:
        with self._current():
            return module.get_function(kernel)

    def launch(self, function: Any, grid: Size, block: Size, shared: int, arguments: Sequence[Number], stream: int) -> None:
        with self._current():
            if stream == 0:
                function(*arguments, grid=grid, block=block, shared=shared)
                return
            if self._stream is None:
                own = self._driver.Stream(_NON_BLOCKING)
                self._stream = own, torch.cuda.ExternalStream(own.handle, device=self._index)
            # PyCUDA's stream waits for PyTorch's before the kernel, and PyTorch's waits for it after.
            own, same_in_pytorch = self._stream
            theirs = torch.cuda.ExternalStream(stream, device=self._index)
            same_in_pytorch.wait_stream(theirs)
            function(*arguments, grid=grid, block=block, shared=shared, stream=own)
            theirs.wait_stream(same_in_pytorch)

    def close(self) -> None:
        self._stream = None
        self._context.detach()  # without this call, PyCUDA would release the context as if it had made it

    def _open(self) -> Any:
        self._driver.init()
        return self._driver.Device(self._index).retain_primary_context()

    def _checked(self, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return call(*arguments)
        except self._driver.Error as error:
            raise DriverError(first_line(error)) from error

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()


class CudaBindings:
    """The driver through NVIDIA's cuda-bindings, which launches on any stream."""

    def __init__(self, index: int) -> None:
        self._driver = _imported("cuda.bindings.driver")
        self._call("cuInit", 0)
        (self._device,) = self._call("cuDeviceGet", index)
        (self._context,) = self._call("cuDevicePrimaryCtxRetain", self._device)

    def load(self, code: bytes) -> Any:
        with self._current():
            return self._call("cuModuleLoadData", code)[0]

    def function(self, module: Any, kernel: str) -> Any:
        with self._current():
            return self._call("cuModuleGetFunction", module, kernel.encode())[0]

    def launch(self, function: Any, grid: Size, block: Size, shared: int, arguments: Sequence[Number], stream: int) -> None:
        values = tuple(argument.item() for argument in arguments), tuple(_TYPES[type(argument)] for argument in arguments)
        with self._current():
            self._call("cuLaunchKernel", function, *grid, *block, shared, stream, values, 0)

    def close(self) -> None:
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _call(self, name: str, *arguments: object) -> tuple[Any, ...]:
        """The results of a function of the driver; DriverError for a status other than success."""
        try:
            status, *results = getattr(self._driver, name)(*arguments)
        except RuntimeError as error:  # cuda-bindings cannot open the driver's library
            raise DriverError(first_line(error)) from error
        if int(status):
            _, text = self._driver.cuGetErrorString(status)
            raise DriverError(f"{name} failed: {text.decode() if text else int(status)}")
        return tuple(results)

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")


DRIVERS: dict[str, Callable[[int], Driver]] = {"pycuda": PyCuda, "cuda.bindings": CudaBindings}
"""The packages that launch kernels, in the order in which they are tried."""
