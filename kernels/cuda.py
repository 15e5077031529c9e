"""Launches of kernels through PyCUDA, on PyTorch's device, context, stream and memory.

`runs` decides whether a call goes to CUDA or stays in PyTorch; `launcher(tensor.device).launch(...)` launches a kernel.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError, first_line, missing_package
from kdx.kernels import cubins

Backend = Literal["auto", "torch", "cuda"]
_BACKENDS = get_args(Backend)

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: a stream that does not wait for the default stream."""
Size = tuple[int, int, int]
Argument = Tensor | np.generic | None

log = logging.getLogger("kdx")


class Launcher(Protocol):
    """Launches kernels."""

    multiprocessors: int
    """The number of the device's multiprocessors, by which wrappers choose grids."""

    def launch(self, source: str, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared: int = 0) -> None:
        """Run ``kernel`` of ``source``.cu after everything that is already on the current stream.

        grid, block: the number of blocks, and of threads per block, along x, y, z. arguments: tensors on the launcher's device, which
        the kernel receives as the address of their first element; None, which is a null pointer; and NumPy numbers of exactly the
        kernel's types. shared: bytes of dynamic shared memory.
        """
        ...


def launcher(device: torch.device) -> Launcher:
    """The launcher of a CUDA device; KdxError if kernels cannot run on it."""
    if device.type != "cuda":
        raise _not_cuda(device)
    gpu = _gpu(torch.cuda.current_device() if device.index is None else device.index)
    if isinstance(gpu, KdxError):
        raise KdxError(gpu.problem, gpu.hint)
    return gpu


def runs(x: Tensor, backend: Backend = "auto") -> bool:
    """Whether a call on ``x`` goes to the CUDA kernels; otherwise it stays in PyTorch.

    auto: true for a CUDA tensor if the kernels can run on its device; if they cannot, the reason is logged once. cuda: raises a
    KdxError instead. The kernels are not used in traced graphs and for recorded gradients.
    """
    if backend == "torch" or (backend == "auto" and (torch.compiler.is_compiling() or not x.is_cuda)):
        return False
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, not {backend!r}")
    try:
        if torch.compiler.is_compiling():
            raise KdxError("The CUDA kernels cannot be traced into a graph.", "Choose the backend torch.")
        if x.requires_grad and torch.is_grad_enabled():
            raise KdxError("The CUDA kernels record no gradient.", "Detach the tensor, or choose the backend torch.")
        launcher(x.device)
    except KdxError as obstacle:
        if backend == "cuda":
            raise
        _log_once(x.device, obstacle.problem)
        return False
    return True


@functools.cache
def _log_once(device: torch.device, problem: str) -> None:
    log.warning("PyTorch in place of the CUDA kernels on %s: %s", device, problem)


def _not_cuda(device: torch.device) -> KdxError:
    return KdxError(
        f"The CUDA kernels run on an NVIDIA GPU, and this tensor is on {device}.", "Move it to a GPU, or choose the backend torch."
    )


class Gpu:
    """The launcher of one device."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.capability = torch.cuda.get_device_capability(index)
        if self.capability < cubins.OLDEST:
            raise KdxError(
                f"The GPU {torch.cuda.get_device_name(index)} has compute capability {self.capability[0]}.{self.capability[1]}, and the "
                f"CUDA kernels need {cubins.OLDEST[0]}.{cubins.OLDEST[1]}.",
                "Choose the backend torch.",
            )
        self.multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
        self._driver = _driver()
        # Compile all sources now, so that no call fails halfway for lack of a kernel.
        with ThreadPoolExecutor() as pool:
            codes = dict(zip(cubins.names(), pool.map(self._code, cubins.names()), strict=True))
        try:
            self._driver.init()
            self._context = self._driver.Device(index).retain_primary_context()  # the context that PyTorch uses
            with self._current():
                self._modules = {source: self._driver.module_from_buffer(code) for source, code in codes.items()}
        except self._driver.Error as error:
            raise KdxError(
                f"The driver of {self.device} does not load the CUDA kernels: {first_line(error)}.",
                "Install a driver as new as the CUDA toolkit that compiles them, or choose the backend torch.",
            ) from error
        self._functions: dict[tuple[str, str], Any] = {}
        self._stream: tuple[Any, torch.cuda.Stream] | None = None  # one stream, as PyCUDA and as PyTorch name it
        self._lock = threading.Lock()

    def launch(self, source: str, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared: int = 0) -> None:
        packed = [self._packed(place, argument) for place, argument in enumerate(arguments)]
        current = torch.cuda.current_stream(self.device)
        with self._lock, self._current():
            if (source, kernel) not in self._functions:
                self._functions[source, kernel] = self._modules[source].get_function(kernel)
            function = self._functions[source, kernel]
            if current.cuda_stream == 0:
                function(*packed, grid=grid, block=block, shared=shared)
                return
            # PyCUDA launches only on the default stream or on a stream that it made. That stream waits for the current one before the
            # kernel, and the current one waits for it after.
            if self._stream is None:
                stream = self._driver.Stream(_NON_BLOCKING)
                self._stream = stream, torch.cuda.ExternalStream(stream.handle, device=self.device)
            stream, same_in_pytorch = self._stream
            same_in_pytorch.wait_stream(current)
            function(*packed, grid=grid, block=block, shared=shared, stream=stream)
            current.wait_stream(same_in_pytorch)

    def close(self) -> None:
        """Release modules, stream and context; PyCUDA warns about any that are left when it ends itself."""
        self._functions.clear()
        self._modules.clear()
        self._stream = None
        self._context.detach()  # without this call, PyCUDA would release the context as if it had made it

    def _packed(self, place: int, argument: Argument) -> np.generic:
        if argument is None:
            return np.uintp(0)
        if isinstance(argument, Tensor):
            if argument.device != self.device:
                raise ValueError(f"argument {place} is on {argument.device}, and the kernel runs on {self.device}")
            return np.uintp(argument.data_ptr())
        if not isinstance(argument, np.number):
            raise TypeError(f"argument {place} is a {type(argument).__name__}, neither a tensor nor a NumPy number")
        return argument

    def _code(self, source: str) -> bytes:
        return cubins.load(source, self.capability).code

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make PyTorch's context current, for PyCUDA's calls."""
        self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()


_gpus: dict[int, Gpu | KdxError] = {}
_opening = threading.Lock()


def _gpu(index: int) -> Gpu | KdxError:
    """The launcher of a device, or the reason why it has none; determined once."""
    with _opening:
        if index not in _gpus:
            try:
                gpu = Gpu(index)
                atexit.register(gpu.close)
                _gpus[index] = gpu
            except KdxError as obstacle:
                _gpus[index] = obstacle
        return _gpus[index]


def _driver() -> Any:
    """The module pycuda.driver; KdxError if it cannot be imported."""
    try:
        return importlib.import_module("pycuda.driver")
    except ModuleNotFoundError:
        raise missing_package("pycuda", "gpu", "The CUDA backend") from None
    except ImportError as error:  # the driver's library is missing
        raise KdxError(
            f"PyCUDA does not load: {first_line(error)}.", "Install the NVIDIA driver; kdx doctor shows what is missing."
        ) from error
