"""Trials of the CUDA kernels for `kdx doctor`: each compiler and each launcher compiles, loads and launches a kernel, whose result is
compared with float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kdx.errors import KdxError, first_line
from kdx.kernels import cubins, geometry
from kdx.kernels.compilers import COMPILERS, Compiler
from kdx.kernels.drivers import DRIVERS, Driver, Number, open_driver

_SOURCE, _KERNEL = "products", "products_centred"
_IMAGES, _THREADS = 300, 256

_HINTS = {
    "compile": "Install PyTorch's CUDA build again, or the CUDA toolkit with a C++ compiler",
    "open": "Install an NVIDIA driver that nvidia-smi can reach, and check CUDA_VISIBLE_DEVICES",
    "load": "Update the NVIDIA driver: it must be at least as new as the compiler's CUDA version",
    "launch": "Check nvidia-smi for other programs that fill the GPU, and for errors of the GPU in the system's log",
    "compare": "Run a memory test before you use this GPU; if it passes, report this with the GPU's name and the driver's version",
}
"""The steps of a trial, with the hint for a step that fails."""


class FailedStep(Exception):
    """A step of a trial fails. hint: how to fix it."""

    def __init__(self, step: str, problem: str, hint: str = "") -> None:
        self.hint = hint or _HINTS[step]
        super().__init__(f"{step}: {problem}")


def try_compiler(name: str) -> str:
    """Describes what a compiler (a key of `COMPILERS`) can do. On a machine with a GPU, a kernel that it compiles is run.

    Raises KdxError if it does not start, and FailedStep for a step that fails.
    """
    compiler = COMPILERS[name]()
    if not torch.cuda.is_available():
        return f"{compiler.version}, compiles for {', '.join(compiler.architectures)}"
    architecture = _architecture(compiler)
    with _step("compile"):
        code, _ = compiler.compile(cubins.SOURCES / f"{_SOURCE}.cu", architecture)
    _run(code, open_driver)
    return f"{compiler.version}, a kernel for {architecture} compiles, loads, runs and gives the right result"


def try_launcher(package: str) -> str:
    """Describes what a launcher (a key of `DRIVERS`) can do, after it has run a kernel. Raises FailedStep for a step that fails."""
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    with _step("compile"):
        code = cubins.load(_SOURCE, torch.cuda.get_device_capability(_device().index)).code
    _run(code, DRIVERS[package])
    return "a kernel loads, runs and gives the right result"


def _architecture(compiler: Compiler) -> str:
    """The architecture for which kdx uses a compiler on this GPU."""
    wanted = cubins.runnable(torch.cuda.get_device_capability(_device().index))
    suitable = cubins.targets(wanted, [compiler])
    if not suitable:
        raise FailedStep("compile", f"{compiler.name} {compiler.version} supports neither {wanted[0]} nor an older architecture")
    return suitable[0][0]


def _run(code: bytes, open_: Callable[[int], Driver]) -> None:
    """Run the kernel on random distances, and compare with `geometry.u_centered` in float64."""
    device = _device()
    with _step("open"):
        driver = open_(device.index or 0)
    try:
        with _step("load"):
            function = driver.function(driver.load(code), _KERNEL)
        with _step("launch"):
            points = torch.randn(_IMAGES, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            distances = torch.cdist(points, points)
            inputs = [matrix.to(device) for matrix in (distances, distances.sum(1), distances.sum().reshape(1))]
            centred = torch.full_like(inputs[0], torch.nan)
            pointers = [np.uintp(matrix.data_ptr()) for matrix in (*inputs, centred)]
            arguments: list[Number] = [*pointers[:3], np.int32(_IMAGES), pointers[3]]
            stream = torch.cuda.current_stream(device)
            driver.launch(function, (1, _IMAGES, 1), (_THREADS, 1, 1), 0, arguments, stream.cuda_stream)
            stream.synchronize()
        error = float((centred.cpu() - geometry.u_centered(distances)).abs().max())
        if not error < 1e-12:  # NaN is not
            raise FailedStep("compare", f"the centred distances of {_IMAGES} points are off by {error:.1e}")
    finally:
        driver.close()


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Turn any error of a step into a FailedStep. A broken installation may raise anything."""
    try:
        yield
    except KdxError as error:
        raise FailedStep(name, error.problem.rstrip("."), error.hint) from error
    except Exception as error:
        raise FailedStep(name, first_line(error)) from error


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
