"""Machine code of the kernels, compiled by nvcc or NVRTC and stored in a cache outside the package.

The name of a cache entry is a hash of its inputs: the source with all headers beside it, the flags, the architecture, and the versions
of kdx and of the compiler. Processes that need the same entry wait for the first of them, and a damaged entry is compiled again.
Without a compiler, an entry of an earlier build (`python -m kdx.kernels build`) is used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from kdx.disk import cache_folder, lock_file, replace_file
from kdx.errors import KdxError

SOURCES = Path(__file__).parent
FLAGS = ("--std=c++17", "--generate-line-info", "--ptxas-options=-v")
"""The flags of nvcc and of NVRTC, which have the same names."""

OLDEST = (7, 5)
"""The oldest compute capability that CUDA 13 compiles for."""

_FORMAT = 1  # version of the layout of a cache entry

log = logging.getLogger("kdx")


@dataclass(frozen=True)
class Usage:
    """What one kernel uses on the device, from the log of ptxas: registers, bytes of stack and bytes of spilled registers, per thread."""

    registers: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Cubin:
    """The machine code of one source for one architecture, and the usage of each of its kernels."""

    code: bytes
    usage: dict[str, Usage]


class Compiler(Protocol):
    """A compiler from a source to machine code."""

    name: str
    version: str
    architectures: tuple[str, ...]

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        """The machine code and the log of ptxas; KdxError if the source does not compile."""
        ...


def names() -> list[str]:
    """The stems of the sources."""
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def folder() -> Path:
    """The folder of the cache: ``cubins`` in KDX_CACHE, else in the platform's cache folder."""
    return cache_folder() / "cubins"


def architecture(capability: tuple[int, int]) -> str:
    """``sm_90`` for compute capability (9, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def load(source: str, capability: tuple[int, int]) -> Cubin:
    """The machine code of a source for a device, from the cache or compiled now.

    Raises KdxError if the source does not compile, if the compiler does not know the device, or if there is neither a compiler
    nor a cache entry.
    """
    runnable = _runnable(capability)
    try:
        available = compiler()
    except KdxError:
        stored = (path for name in runnable for path in sorted(folder().glob(f"{_name(source, name)}-*.cubin")))
        cubin = next((cubin for path in stored if (cubin := _read(path))), None)
        if cubin is None:
            raise
        return cubin
    best = next((name for name in runnable if name in available.architectures), None)
    if best is None:
        raise KdxError(
            f"{available.name} {available.version} does not compile for {runnable[0]}.",
            f"Install a CUDA toolkit that compiles for it; the installed one supports {', '.join(available.architectures)}.",
        )
    return build(source, best, available)


def build(source: str, architecture: str, compiler: Compiler) -> Cubin:
    """The machine code of a source for one architecture by one compiler, from the cache or compiled now."""
    key = hashlib.sha256(f"{compiler.name}\0{compiler.version}".encode()).hexdigest()[:8]
    entry = folder() / f"{_name(source, architecture)}-{key}.cubin"
    if (cubin := _read(entry)) is not None:
        return cubin
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(entry.with_suffix(".lock"), wait=True):
            if (cubin := _read(entry)) is None:  # else another process has compiled it in the meantime
                log.info("%s compiles %s.cu for %s, once for this version of it", compiler.name, source, architecture)
                code, ptxas_log = compiler.compile(SOURCES / f"{source}.cu", architecture)
                cubin = Cubin(code, usage(ptxas_log))
                _write(entry, cubin)
    except OSError as error:
        raise KdxError(
            f"The kernels cannot be cached in {entry.parent}: {error}.", "Set the variable KDX_CACHE to a folder that you can write to."
        ) from error
    return cubin


def usage(ptxas_log: str) -> dict[str, Usage]:
    """The usage of each kernel, from the log of ptxas -v."""
    usages = {}
    for part in ptxas_log.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None:
            raise ValueError(f"the log of ptxas has no number of registers: {part}")
        usages[part.split("'")[0]] = Usage(
            int(registers[1]),
            sum(map(int, re.findall(r"(\d+) bytes stack frame", part))),
            sum(map(int, re.findall(r"(\d+) bytes spill", part))),
        )
    return usages


def _runnable(capability: tuple[int, int]) -> list[str]:
    """The architectures whose machine code a device runs, best first: its own, then older ones of its generation."""
    return [architecture((capability[0], minor)) for minor in range(capability[1], -1, -1)]


# ---- the cache ----


def _name(source: str, architecture: str) -> str:
    """The name of an entry, without the part for its compiler."""
    path = SOURCES / f"{source}.cu"
    if not path.exists():
        raise ValueError(f"there is no source {source!r}; there are {', '.join(names())}")
    try:
        release = version("kdx")
    except PackageNotFoundError:  # a checkout that is not installed
        release = ""
    texts = [path.read_bytes(), *(header.read_bytes() for header in sorted(SOURCES.glob("*.cuh")))]
    inputs = [str(_FORMAT), release, architecture, *FLAGS, *(hashlib.sha256(text).hexdigest() for text in texts)]
    return f"{source}-{architecture}-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]}"


def _read(path: Path) -> Cubin | None:
    """The content of an entry; None if the file does not exist or is damaged."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        description = json.loads(head)
        if description["sha256"] != hashlib.sha256(code).hexdigest():
            return None
        return Cubin(code, {name: Usage(**numbers) for name, numbers in description["usage"].items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, cubin: Cubin) -> None:
    """Write one line of JSON, then the machine code."""
    usages = {name: asdict(usage) for name, usage in cubin.usage.items()}
    description = {"sha256": hashlib.sha256(cubin.code).hexdigest(), "usage": usages}
    replace_file(path, json.dumps(description).encode() + b"\n" + cubin.code)


# ---- compilers ----


@functools.cache
def compiler() -> Compiler:
    """nvcc if it is installed, else NVRTC; KdxError if neither is."""
    nvcc = _find_nvcc()
    if nvcc is not None:
        return Nvcc(nvcc)
    library, headers = _find_nvrtc(), _find_headers()
    if library is None or headers is None:
        missing = (
            "neither nvcc nor NVRTC is installed" if library is None else f"nvcc is not installed, and {library.name} lacks cuda_fp16.h"
        )
        raise KdxError(
            f"The CUDA kernels cannot be compiled: {missing}.",
            "Install the CUDA toolkit (nvcc on PATH), or PyTorch's CUDA build, which brings NVRTC.",
        )
    return Nvrtc(library, headers)


class Nvcc:
    """The compiler of the CUDA toolkit. Only the machine code of the device is used from its output."""

    name = "nvcc"

    def __init__(self, path: Path) -> None:
        self._path = path
        output = self._run("--version")
        release = re.search(r"release \S+ V(\S+)", output)
        if release is None:
            raise _compile_error(self.name, output or "error: no version", str(path))
        self.version = release[1]
        self.architectures = tuple(self._run("--list-gpu-code").split())

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "cubin"
            log = self._run("--cubin", f"--gpu-architecture={architecture}", *FLAGS, f"--output-file={out}", str(source))
            return out.read_bytes(), log

    def _run(self, *options: str) -> str:
        try:
            done = subprocess.run([self._path, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        except OSError as error:
            raise _compile_error(self.name, f"error: {error}", options[-1]) from error
        if done.returncode:
            raise _compile_error(self.name, done.stdout, options[-1])
        return done.stdout


class Nvrtc:
    """The compiler library that comes with PyTorch's CUDA build. It needs the headers for half precision from elsewhere."""

    name = "NVRTC"

    def __init__(self, library: Path, headers: Path) -> None:
        for builtins in library.parent.glob("libnvrtc-builtins.so*"):  # NVRTC opens it by its bare name
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(library))
        self._headers = headers
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        self.version = f"{major.value}.{minor.value}"
        self.architectures = tuple(f"sm_{number}" for number in known)

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        options = [f"--gpu-architecture={architecture}", *FLAGS, f"--include-path={source.parent}", f"--include-path={self._headers}"]
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
        try:
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), encoded)
            log = self._bytes("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if failed:
                raise _compile_error(self.name, log, source.name)
            return self._bytes("CUBIN", program), log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} returned status {status}")


def _compile_error(name: str, output: str, source: str) -> KdxError:
    lines = [line.strip() for line in output.splitlines() if "error" in line.lower() or "fatal" in line.lower()]
    return KdxError(
        f"{name} cannot compile {Path(source).name}: {(lines or [output.strip() or 'it gives no reason'])[0].rstrip('.')}.",
        "Check the CUDA toolkit (nvcc needs a C++ compiler), or choose the backend torch.",
    )


def _find_nvcc() -> Path | None:
    on_path = shutil.which("nvcc")
    if on_path is not None:
        return Path(on_path)
    return next((path for root in _toolkits() if (path := root / "bin" / "nvcc").is_file()), None)


def _find_nvrtc() -> Path | None:
    return next((path for root in _libraries() for place in ("lib", "lib64", "*/lib") for path in root.glob(f"{place}/libnvrtc.so*")), None)


def _find_headers() -> Path | None:
    headers = (path for root in _libraries() for place in ("include", "*/include") for path in root.glob(f"{place}/cuda_fp16.h"))
    return next((path.parent for path in headers), None)


def _toolkits() -> Sequence[Path]:
    return [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def _libraries() -> Sequence[Path]:
    """Folders that may contain CUDA's libraries and headers: the packages of PyTorch's CUDA build, PyTorch itself, and a toolkit."""
    packages = importlib.util.find_spec("nvidia")
    torch = importlib.util.find_spec("torch")
    homes = [*(packages.submodule_search_locations or () if packages else ()), *(torch.submodule_search_locations or () if torch else ())]
    return [*map(Path, homes), *_toolkits()]
