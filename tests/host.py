"""The kernels on the CPU: g++ compiles the same `.cu` files, and a launcher runs them on CPU tensors.

`running` replaces the GPU's launcher with it, so that a test calls a wrapper of `kdx.kernels` and compares the results. Every launch is
a separate process, under the address and undefined-behaviour sanitizers, on copies of the tensors' memory of exactly their size.
kernels/host/launch.cpp describes which errors are detected and which are not.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from kdx.kernels import cuda

Order = Literal["forward", "reverse", "shuffled"]
ORDERS: tuple[Order, ...] = ("forward", "reverse", "shuffled")
"""Orders of blocks, and of the threads of a block between two points where they wait for one another."""

KERNELS = Path(__file__).parents[1] / "kernels"
SECONDS = 60
"""The time after which a launch counts as hung."""

_BUILDS = Path(__file__).parents[1] / ".pytest_cache" / "kernels"
_COMPILE = (
    *("g++", "-std=c++17", "-O1", "-g1", "-DKDX_HOST", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    *("-fsanitize=address,undefined", "-fsanitize-sections=kdx_shared", "-fno-sanitize-recover=all"),
)
_KERNEL = re.compile(r'extern\s+"C"\s+__attribute__\s*\(\(used\)\)\s+void\s+(\w+)\s*\(([^)]*)\)')
POINTER = np.dtype(np.uintp).name
_TYPES = {"int": "int32", "long long": "int64", "float": "float32", "double": "float64"}


class KernelError(Exception):
    """A launch that the sanitizers or the emulation stopped, with their message."""


class HostLauncher:
    """`kdx.kernels.cuda.Launcher` on the CPU.

    changed: maps file names to texts, which replace files of kernels/ or add to them. multiprocessors: the number by which wrappers
    choose grids; small, so that a block of a small test has several pieces of work. Raises KernelError if a launch is stopped.
    """

    def __init__(self, order: Order = "forward", seed: int = 0, changed: Mapping[str, str] | None = None, multiprocessors: int = 3) -> None:
        self.order = order
        self.seed = seed
        self.multiprocessors = multiprocessors
        self.can_be_captured = False
        self._changed = tuple(sorted((changed or {}).items()))

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Tensor | np.generic | None],
        shared: int = 0,
    ) -> None:
        memories: dict[int, torch.UntypedStorage] = {}
        words: list[object] = []
        for argument in arguments:
            if argument is None or (isinstance(argument, Tensor) and argument.data_ptr() == 0):
                words += ["null"]
            elif isinstance(argument, Tensor):
                assert argument.device.type == "cpu"
                memory = argument.untyped_storage()
                memories.setdefault(memory.data_ptr(), memory)
                which = list(memories).index(memory.data_ptr())
                words += ["tensor", str(argument.dtype).removeprefix("torch."), which, argument.data_ptr() - memory.data_ptr()]
            else:
                words += ["number", argument.dtype.name, argument.tobytes().hex()]
        sizes = [len(memories), *(memory.nbytes() for memory in memories.values())]
        head = [kernel, *grid, *block, shared, self.order, self.seed, *sizes, len(arguments), *words]
        views = [torch.empty(0, dtype=torch.uint8).set_(memory).numpy() for memory in memories.values()]
        sent = b"".join([" ".join(map(str, head)).encode() + b"\n", *(view.tobytes() for view in views)])
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        try:
            done = subprocess.run(
                [_program(source, self._changed)], input=sent, env=environment, timeout=SECONDS, capture_output=True, check=False
            )
        except subprocess.TimeoutExpired:
            raise KernelError(f"{kernel} of {source}.cu does not end") from None
        if done.returncode:
            raise KernelError(f"{kernel} of {source}.cu, {self.order}: {done.stderr.decode(errors='replace').strip()}")
        start = 0
        for view in views:
            view[:] = np.frombuffer(done.stdout, np.uint8, len(view), start)
            start += len(view)


@contextmanager
def running(launcher: HostLauncher | None = None) -> Iterator[HostLauncher]:
    """Run CPU tensors on ``launcher`` where kdx would launch on a GPU, except with the backend torch.

    Memory from torch.empty is NaN in the meantime, so that elements that a kernel does not write are detected.
    """
    launcher = launcher or HostLauncher()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "launcher", lambda device: launcher)
        patch.setattr(cuda, "runs", lambda x, backend="auto": backend != "torch")
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            yield launcher
        finally:
            torch.use_deterministic_algorithms(deterministic)


def broken(source: str, old: str, new: str, order: Order = "forward", seed: int = 0, file: str | None = None) -> HostLauncher:
    """A launcher for a kernel with one piece of its text replaced. It is compiled at once, because the change must compile.

    source: the stem of a file ("cam"); file: the file to change, if it is a header ("reduce.cuh").
    """
    name = file or f"{source}.cu"
    text = (KERNELS / name).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {name}"
    launcher = HostLauncher(order, seed, {name: text.replace(old, new)})
    _program(source, launcher._changed)
    return launcher


# ---- compiling ----


def kernels(source: Path) -> list[str]:
    """The kernels that a file defines, including those of its macros."""
    return [name for name, _ in _definitions(source)]


@functools.cache
def declared() -> dict[str, tuple[str, ...]]:
    """The types of the parameters of each kernel of kernels/*.cu, as NumPy names them."""
    if shutil.which("g++") is None:
        pytest.skip("no g++, which reads the sources")
    definitions = [definition for path in sorted(KERNELS.glob("*.cu")) for definition in _definitions(path)]
    return {name: tuple(_type(parameter) for parameter in text.split(",")) for name, text in definitions}


def _type(parameter: str) -> str:
    return POINTER if "*" in parameter else _TYPES[parameter.strip().rpartition(" ")[0]]


def _definitions(source: Path) -> list[tuple[str, str]]:
    """The name and the text of the parameters of each kernel."""
    return _KERNEL.findall(_run(*_COMPILE, f"-I{source.parent}", f"-I{KERNELS}", "-E", "-P", "-x", "c++", str(source)))


@functools.cache
def _program(source: str, changed: tuple[tuple[str, str], ...]) -> Path:
    """The executable of one `.cu` file, from a cache whose key is the text of all its sources."""
    texts = {path.name: path.read_text() for path in (*KERNELS.glob("*.cuh"), KERNELS / f"{source}.cu") if path.exists()} | dict(changed)
    runner = _runner()
    key = hashlib.sha256("\0".join([runner.name, source, *_COMPILE, *(text for pair in sorted(texts.items()) for text in pair)]).encode())
    program = _BUILDS / f"{source}-{key.hexdigest()[:24]}"
    if not program.exists():
        with _made(program) as folder:
            for name, text in texts.items():
                (folder / name).write_text(text)
            names = kernels(folder / f"{source}.cu")
            assert names, f"{source}.cu has no kernel"
            unit = folder / "unit.cpp"
            # In an anonymous namespace, shared memory of templates is in the same section as that of functions.
            unit.write_text(
                f'#include "common.cuh"\n#include "host/launch.h"\nnamespace {{\n#include "{source}.cu"\n'
                + "".join(f"KDX_KERNEL({name})\n" for name in names)
                + "}\n"
            )
            _run(*_COMPILE, f"-I{folder}", f"-I{KERNELS}", str(unit), str(runner), "-o", str(folder / "made"))
    return program


@functools.cache
def _runner() -> Path:
    """The object file that runs a launch, the same for every kernel."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("no g++ on Linux, which compiles the kernels for the CPU")
    host = KERNELS / "host"
    key = hashlib.sha256("\0".join([*_COMPILE, *(path.read_text() for path in sorted(host.iterdir()))]).encode()).hexdigest()[:24]
    made = _BUILDS / f"launch-{key}.o"
    if not made.exists():
        with _made(made) as folder:
            _run(*_COMPILE, "-c", str(host / "launch.cpp"), "-o", str(folder / "made"))
    return made


@contextmanager
def _made(target: Path) -> Iterator[Path]:
    """A folder in which the caller writes the file ``made``, which is then renamed to the target."""
    _BUILDS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_BUILDS) as folder:
        yield Path(folder)
        (Path(folder) / "made").replace(target)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
