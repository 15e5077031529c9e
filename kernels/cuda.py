"""Launches of kernels on PyTorch's device, stream and memory.

`runs` decides whether a call goes to CUDA or stays in PyTorch; `launcher(tensor.device).launch(...)` launches a kernel.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError, first_line
from kdx.kernels import cubins
from kdx.kernels.drivers import CudaBindings, DriverError, Number, Size, open_driver

Backend = Literal["auto", "torch", "cuda"]
_BACKENDS = get_args(Backend)

Argument = Tensor | np.generic | None

log = logging.getLogger("kdx")


class Launcher(Protocol):
    """Launches kernels."""

    multiprocessors: int
    """The number of the device's multiprocessors, by which wrappers choose grids."""

    can_be_captured: bool
    """Whether launches can become part of a CUDA graph."""

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
        # Compile all sources now, so that no call fails halfway for lack of a kernel.
        with ThreadPoolExecutor() as pool:
            codes = dict(zip(cubins.names(), pool.map(self._code, cubins.names()), strict=True))
        try:
            self._driver = open_driver(index)
            self._modules = {source: self._driver.load(code) for source, code in codes.items()}
        except DriverError as error:
            raise KdxError(
                f"The driver of {self.device} does not load the CUDA kernels: {error}.",
                "Install a driver as new as the CUDA toolkit that compiles them, or choose the backend torch.",
            ) from error
        self.can_be_captured = isinstance(self._driver, CudaBindings)  # PyCUDA has streams of its own
        self._functions: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def launch(self, source: str, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared: int = 0) -> None:
        packed = [self._packed(place, argument) for place, argument in enumerate(arguments)]
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with self._lock:
            if (source, kernel) not in self._functions:
                self._functions[source, kernel] = self._driver.function(self._modules[source], kernel)
            self._driver.launch(self._functions[source, kernel], grid, block, shared, packed, stream)

    def close(self) -> None:
        """Release modules and context; a driver warns about any that are left when it ends itself."""
        self._functions.clear()
        self._modules.clear()
        self._driver.close()

    def _packed(self, place: int, argument: Argument) -> Number:
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
            except Exception as error:  # a broken installation may raise anything
                _gpus[index] = KdxError(
                    f"The CUDA kernels do not start on cuda:{index}: {type(error).__name__}: {first_line(error)}.",
                    "Run kdx doctor to see which part fails, or choose the backend torch.",
                )
        return _gpus[index]
