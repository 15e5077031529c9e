"""Machine code of the kernels, by nvcc or NVRTC, kept in a cache outside the package.

An entry of the cache is named by what it was made of: the source with every header beside it, the flags, the architecture,
kdx's version and the compiler's. Processes that want the same entry wait for the first of them, and an entry that was damaged is
made again. Where there is no compiler, an entry that one left there earlier (`python -m kdx.kernels build`) will do.
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
"""For nvcc and NVRTC, which spell them alike."""

OLDEST = (7, 5)
"""The oldest compute capability that CUDA 13 compiles for."""

_FORMAT = 1  # of an entry of the cache

log = logging.getLogger("kdx")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on the device, as ptxas says: registers a thread, and bytes a thread of stack and of spilled registers."""

    registers: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Cubin:
    """The machine code of one source for one architecture, and what each of its kernels takes."""

    code: bytes
    usage: dict[str, Usage]


class Compiler(Protocol):
    """What makes machine code of a source."""

    name: str
    version: str
    architectures: tuple[str, ...]

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        """The machine code and what ptxas says of it; KdxError where the source does not compile."""
        ...


def names() -> list[str]:
    """The sources by their stems."""
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def folder() -> Path:
    """Where entries are kept: KDX_CACHE, else the platform's folder for caches."""
    return cache_folder() / "cubins"


def architecture(capability: tuple[int, int]) -> str:
    """``sm_90`` for compute capability (9, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def load(source: str, capability: tuple[int, int]) -> Cubin:
    """A source's machine code for a device, from the cache or made now.

    Raises KdxError where the source does not compile, the compiler does not know the device, or there is neither a compiler
    nor an entry.
    """
    wanted = _runnable(capability)
    try:
        made_by = compiler()
    except KdxError:
        stored = (path for each in wanted for path in sorted(folder().glob(f"{_name(source, each)}-*.cubin")))
        cubin = next((cubin for path in stored if (cubin := _read(path))), None)
        if cubin is None:
            raise
        return cubin
    known = next((each for each in wanted if each in made_by.architectures), None)
    if known is None:
        raise KdxError(
            f"{made_by.name} {made_by.version} does not compile for {wanted[0]}.",
            f"Install a CUDA toolkit that does; this one knows {', '.join(made_by.architectures)}.",
        )
    return build(source, known, made_by)


def build(source: str, architecture: str, made_by: Compiler) -> Cubin:
    """A source's machine code for one architecture by one compiler, from the cache or made now."""
    key = hashlib.sha256(f"{made_by.name}\0{made_by.version}".encode()).hexdigest()[:8]
    entry = folder() / f"{_name(source, architecture)}-{key}.cubin"
    if (cubin := _read(entry)) is not None:
        return cubin
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(entry.with_suffix(".lock"), wait=True):
            if (cubin := _read(entry)) is None:  # else another process made it meanwhile
                log.info("%s compiles %s.cu for %s, once for this version of it", made_by.name, source, architecture)
                code, said = made_by.compile(SOURCES / f"{source}.cu", architecture)
                cubin = Cubin(code, usage(said))
                _write(entry, cubin)
    except OSError as error:
        raise KdxError(f"The kernels cannot be kept in {entry.parent}: {error}.", "Name a folder in the variable KDX_CACHE.") from error
    return cubin


def usage(said: str) -> dict[str, Usage]:
    """What each kernel takes, from what ptxas says with -v."""
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None:
            raise ValueError(f"ptxas says nothing of registers: {part}")
        found[part.split("'")[0]] = Usage(
            int(registers[1]),
            sum(map(int, re.findall(r"(\d+) bytes stack frame", part))),
            sum(map(int, re.findall(r"(\d+) bytes spill", part))),
        )
    return found


def _runnable(capability: tuple[int, int]) -> list[str]:
    """The architectures whose machine code a device runs, the best first: its own, and older ones of its generation."""
    return [architecture((capability[0], minor)) for minor in range(capability[1], -1, -1)]


# ---- the cache ----


def _name(source: str, architecture: str) -> str:
    """An entry's name but for its compiler."""
    path = SOURCES / f"{source}.cu"
    if not path.exists():
        raise ValueError(f"no kernels {source!r}: {', '.join(names())}")
    try:
        release = version("kdx")
    except PackageNotFoundError:  # a checkout that is not installed
        release = ""
    texts = [path.read_bytes(), *(header.read_bytes() for header in sorted(SOURCES.glob("*.cuh")))]
    made_of = [str(_FORMAT), release, architecture, *FLAGS, *(hashlib.sha256(text).hexdigest() for text in texts)]
    return f"{source}-{architecture}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]}"


def _read(path: Path) -> Cubin | None:
    """What an entry holds; None where there is none, or not a whole one."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        said = json.loads(head)
        if said["sha256"] != hashlib.sha256(code).hexdigest():
            return None
        return Cubin(code, {name: Usage(**each) for name, each in said["usage"].items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, cubin: Cubin) -> None:
    """One line of JSON, then the machine code; in place at once and whole."""
    said = {"sha256": hashlib.sha256(cubin.code).hexdigest(), "usage": {name: asdict(each) for name, each in cubin.usage.items()}}
    replace_file(path, json.dumps(said).encode() + b"\n" + cubin.code)


# ---- compilers ----


@functools.cache
def compiler() -> Compiler:
    """nvcc if it is there, else NVRTC; KdxError where neither is."""
    nvcc = _find_nvcc()
    if nvcc is not None:
        return Nvcc(nvcc)
    library, headers = _find_nvrtc(), _find_headers()
    if library is None or headers is None:
        missing = "neither nvcc nor NVRTC is there" if library is None else f"nvcc is not there, and {library.name} lacks cuda_fp16.h"
        raise KdxError(
            f"Nothing here compiles the CUDA kernels: {missing}.",
            "Install the CUDA toolkit (nvcc on PATH), or PyTorch's CUDA build, which brings NVRTC.",
        )
    return Nvrtc(library, headers)


class Nvcc:
    """The compiler of the CUDA toolkit, of whose output only the machine code of the device is wanted."""

    name = "nvcc"

    def __init__(self, path: Path) -> None:
        self._path = path
        said = self._run("--version")
        release = re.search(r"release \S+ V(\S+)", said)
        if release is None:
            raise _refused(self.name, said or "error: no version", str(path))
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
            raise _refused(self.name, f"error: {error}", options[-1]) from error
        if done.returncode:
            raise _refused(self.name, done.stdout, options[-1])
        return done.stdout


class Nvrtc:
    """The compiler that comes with PyTorch's CUDA build, as a library; it has no headers of its own for half precision."""

    name = "NVRTC"

    def __init__(self, library: Path, headers: Path) -> None:
        for builtins in library.parent.glob("libnvrtc-builtins.so*"):  # which NVRTC opens by its bare name
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(library))
        self._headers = headers
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        self.version = f"{major.value}.{minor.value}"
        self.architectures = tuple(f"sm_{each}" for each in known)

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        options = [f"--gpu-architecture={architecture}", *FLAGS, f"--include-path={source.parent}", f"--include-path={self._headers}"]
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), given)
            log = self._bytes("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if failed:
                raise _refused(self.name, log, source.name)
            return self._bytes("CUBIN", program), log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        held = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, held)
        return held.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} gives status {status}")


def _refused(name: str, said: str, what: str) -> KdxError:
    lines = [line.strip() for line in said.splitlines() if "error" in line.lower() or "fatal" in line.lower()]
    return KdxError(
        f"{name} cannot compile {Path(what).name}: {(lines or [said.strip() or 'it says nothing'])[0].rstrip('.')}.",
        "Check the CUDA toolkit (nvcc needs a C++ compiler), or choose the backend torch.",
    )


def _find_nvcc() -> Path | None:
    found = shutil.which("nvcc")
    if found is not None:
        return Path(found)
    return next((path for root in _toolkits() if (path := root / "bin" / "nvcc").is_file()), None)


def _find_nvrtc() -> Path | None:
    return next((path for root in _libraries() for place in ("lib", "lib64", "*/lib") for path in root.glob(f"{place}/libnvrtc.so*")), None)


def _find_headers() -> Path | None:
    headers = (path for root in _libraries() for place in ("include", "*/include") for path in root.glob(f"{place}/cuda_fp16.h"))
    return next((path.parent for path in headers), None)


def _toolkits() -> Sequence[Path]:
    return [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def _libraries() -> Sequence[Path]:
    """Where CUDA's libraries and headers lie: the packages that PyTorch's CUDA build brings, PyTorch itself, a toolkit."""
    packages = importlib.util.find_spec("nvidia")
    torch = importlib.util.find_spec("torch")
    homes = [*(packages.submodule_search_locations or () if packages else ()), *(torch.submodule_search_locations or () if torch else ())]
    return [*map(Path, homes), *_toolkits()]
