"""The launches of every kernel have the arguments that its source declares: a launch with too few reads memory of others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernel_cases import CHECKED, cases
from kdx.errors import KdxError
from kdx.kernels import imputation
from kdx.kernels.cuda import Argument
from kdx.kernels.drivers import Size
from tests.host import POINTER, HostLauncher, declared, running

ROOT = Path(__file__).parents[2]


class Recording(HostLauncher):
    """A launcher that records the types of the arguments of each kernel. Nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: dict[str, set[tuple[str, ...]]] = {}

    def launch(self, source: str, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared: int = 0) -> None:
        types = tuple(POINTER if value is None or isinstance(value, Tensor) else value.dtype.name for value in arguments)
        self.launched.setdefault(kernel, set()).add(types)


def test_every_kernel_is_launched_with_the_arguments_that_it_declares() -> None:
    with running(Recording()) as launcher:
        for case in cases(CHECKED[0], torch.device("cpu"), 1):
            with suppress(KdxError):  # results that mean nothing
                case.run()
        for dtype in (torch.float32, torch.float64):
            with suppress(KdxError):
                imputation.impute(torch.zeros(1, 1, 33, 33, dtype=dtype), torch.eye(33, dtype=torch.bool), backend="cuda")
    assert isinstance(launcher, Recording)
    assert launcher.launched == {kernel: {types} for kernel, types in declared().items()}


def test_the_declared_arguments_are_read_from_the_sources() -> None:
    kernels = declared()
    assert kernels["products_centred"] == (POINTER, POINTER, POINTER, "int32", POINTER)
    assert kernels["means_float16"] == (POINTER, "int64", *["int32"] * 6, POINTER, POINTER)
    assert kernels["cam_weights"] == (POINTER, "int32", "int32", "float64", *[POINTER] * 5)


def test_only_the_launcher_and_the_doctor_launch_on_a_driver() -> None:
    """The stand-ins for a driver compare the arguments with the source, and the emulation those of a launcher."""
    files = [path for folder in ("kdx", "kernels") for path in (ROOT / folder).rglob("*.py")]
    direct = {path.name for path in files if re.search(r"driver\.launch\(", path.read_text("utf-8"))}
    assert direct == {"cuda.py", "doctor_kernels.py"}
