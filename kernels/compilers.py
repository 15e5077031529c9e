"""The compilers of the CUDA kernels: the NVRTC that comes with PyTorch, and nvcc.

Both compile a source into machine code for one architecture (``sm_90``), or into PTX for a virtual architecture (``compute_90``), which
a driver turns into machine code for any GPU of that compute capability or a higher one.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from kdx.errors import KdxError, first_line

FLAGS = ("--std=c++17", "--generate-line-info", "--ptxas-options=-v")
"""The flags of nvcc and of NVRTC, which have the same names."""

PTX = "compute_"
"""The prefix of the names of virtual architectures, for which a compiler returns PTX."""


class Compiler(Protocol):
    """A compiler from a source to machine code or PTX."""

    name: str
    version: str
    architectures: tuple[str, ...]
    """The real architectures (``sm_90``). Each has a virtual one (``compute_90``)."""

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        """The machine code or PTX, and the log of ptxas, which is empty for PTX. Raises KdxError if the source does not compile."""
        ...


@functools.cache
def compilers() -> tuple[Compiler, ...]:
    """The compilers that start on this machine, in the order in which they are tried.

    NVRTC is first because it belongs to PyTorch's own CUDA version, while an nvcc on the PATH may be older than the GPU. Raises KdxError
    with all reasons if none starts.
    """
    started: list[Compiler] = []
    problems: list[str] = []
    for start in COMPILERS.values():
        try:
            started.append(start())
        except KdxError as error:
            problems.append(error.problem.rstrip("."))
    if not started:
        raise KdxError(
            f"The CUDA kernels cannot be compiled: {'; '.join(problems)}.",
            "Install PyTorch's CUDA build, which includes NVRTC, or the CUDA toolkit (nvcc on PATH).",
        )
    return tuple(started)


def nvrtc() -> Compiler:
    """NVRTC. Raises KdxError if it is not installed or does not load."""
    library, headers = find_nvrtc(), find_headers()
    hint = "Install PyTorch's CUDA build, which includes NVRTC and its headers."
    if library is None:
        raise KdxError("NVRTC is not installed.", hint)
    if headers is None:
        raise KdxError(f"{library.name} lacks the header cuda_fp16.h.", hint)
    try:
        return Nvrtc(library, headers)
    except (OSError, AttributeError) as error:  # a library that is damaged, or of another system
        raise KdxError(f"{library.name} does not load: {first_line(error)}.", "Install PyTorch's CUDA build again.") from error


def nvcc() -> Compiler:
    """nvcc. Raises KdxError if it is not installed or does not start."""
    path = find_nvcc()
    if path is None:
        raise KdxError("nvcc is not installed.", "Install the CUDA toolkit (nvcc on PATH); PyTorch's NVRTC also suffices.")
    return Nvcc(path)


COMPILERS: dict[str, Callable[[], Compiler]] = {"NVRTC": nvrtc, "nvcc": nvcc}
"""The compilers in the order in which they are tried."""


class Nvcc:
    """The compiler of the CUDA toolkit. Only the device code of its output is used."""

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
            output = "--ptx" if architecture.startswith(PTX) else "--cubin"
            log = self._run(output, f"--gpu-architecture={architecture}", *FLAGS, f"--output-file={out}", str(source))
            code = out.read_bytes()
        return (code + b"\0", "") if architecture.startswith(PTX) else (code, log)  # a driver takes PTX as text that ends with a zero byte

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
            return (self._bytes("PTX", program), "") if architecture.startswith(PTX) else (self._bytes("CUBIN", program), log)
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
            raise _compile_error(self.name, f"error: {function} returned status {status}", "the kernels")


def _compile_error(name: str, output: str, source: str) -> KdxError:
    lines = [line.strip() for line in output.splitlines() if "error" in line.lower() or "fatal" in line.lower()]
    return KdxError(
        f"{name} cannot compile {Path(source).name}: {(lines or [output.strip() or 'it gives no reason'])[0].rstrip('.')}.",
        "Check the CUDA toolkit (nvcc needs a C++ compiler), or choose the backend torch.",
    )


def find_nvcc() -> Path | None:
    on_path = shutil.which("nvcc")
    if on_path is not None:
        return Path(on_path)
    return next((path for root in _toolkits() if (path := root / "bin" / "nvcc").is_file()), None)


def find_nvrtc() -> Path | None:
    return next((path for root in _libraries() for place in ("lib", "lib64", "*/lib") for path in root.glob(f"{place}/libnvrtc.so*")), None)


def find_headers() -> Path | None:
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
