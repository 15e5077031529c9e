"""Machine code of the kernels, compiled by NVRTC or nvcc and stored in a cache outside the package.

The name of a cache entry is a hash of its inputs: the source with all headers beside it, the flags, the architecture, and the versions
of kdx and of the compiler. Processes that need the same entry wait for the first of them, and a damaged entry is compiled again.
Without a compiler, an entry of an earlier build (`python -m kdx.kernels build`) is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kdx.disk import cache_folder, lock_file, replace_file
from kdx.errors import KdxError
from kdx.kernels.compilers import FLAGS, PTX, Compiler, compilers

SOURCES = Path(__file__).parent
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
    """The machine code of one source for one architecture, and the usage of each of its kernels. For a virtual architecture the code is
    PTX, and the usage is unknown."""

    code: bytes
    usage: dict[str, Usage]


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
    """The code of a source for a device, from the cache or compiled now.

    The order is: machine code for the device's own architecture, then for older ones of its generation, then PTX, which the driver compiles
    for a GPU that is newer than the compilers. Each is compiled by the first of `kdx.kernels.compilers.compilers` that succeeds. If none
    succeeds, any entry of the cache that the device can run is used.

    Raises KdxError with the reason of the first compiler if there is neither a working compiler nor a cache entry.
    """
    names = runnable(capability)
    try:
        return _compiled(source, names, compilers())
    except KdxError:
        stored = (path for name in names for path in sorted(folder().glob(f"{_name(source, name)}-*.cubin")))
        cubin = next((cubin for path in stored if (cubin := _read(path))), None)
        if cubin is None:
            raise
        return cubin


def _compiled(source: str, runnable: Sequence[str], available: Sequence[Compiler]) -> Cubin:
    """The code for the first of the ``runnable`` architectures for which a compiler succeeds. Raises the KdxError of the first failure."""
    failures: list[KdxError] = []
    for name, compiler in targets(runnable, available):
        try:
            return build(source, name, compiler)
        except KdxError as failure:
            failures.append(failure)
    if failures:
        raise failures[0]
    known = "; ".join(f"{compiler.name} {compiler.version} supports {', '.join(compiler.architectures)}" for compiler in available)
    raise KdxError(
        f"No installed compiler supports {runnable[0]}: {known}.", "Install PyTorch's CUDA build or a CUDA toolkit that supports this GPU."
    )


def targets(runnable: Sequence[str], available: Sequence[Compiler]) -> list[tuple[str, Compiler]]:
    """The pairs (architecture, compiler) for a device in the order in which they are tried."""
    return [(name, compiler) for name in runnable for compiler in available if name.replace(PTX, "sm_") in compiler.architectures]


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


def runnable(capability: tuple[int, int]) -> list[str]:
    """The architectures whose code a device can run, best first: machine code for itself, then for older devices of its generation; then
    the virtual architectures up to its own, whose PTX its driver compiles."""
    major, minor = capability
    virtual = [(older, part) for older in range(major, OLDEST[0] - 1, -1) for part in range(9, -1, -1)]
    return [
        *(architecture((major, part)) for part in range(minor, -1, -1)),
        *(architecture(each).replace("sm_", PTX) for each in virtual if OLDEST <= each <= capability),
    ]


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
