"""nvcc and NVRTC: which one is chosen, how they are called, and how their errors are reported."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdx.errors import KdxError
from kdx.kernels import cubins
from kdx.kernels.compilers import FLAGS, Nvcc, Nvrtc, compilers, find_headers, find_nvcc, find_nvrtc
from kdx.kernels.cubins import Usage

NVCC, NVRTC, HEADERS = find_nvcc(), find_nvrtc(), find_headers()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@needs_nvcc
def test_a_mistake_in_a_source_is_reported_in_the_compilers_words(sources: Path) -> None:
    assert NVCC is not None
    (sources / "one.cu").write_text('extern "C" __global__ void one(float* x) { *x = undeclared; }')
    with pytest.raises(KdxError, match=r'nvcc cannot compile one\.cu: .*identifier "undeclared" is undefined'):
        cubins.build("one", "sm_90", Nvcc(NVCC))


@needs_nvcc
def test_nvcc_compiles_a_virtual_architecture_to_ptx(sources: Path) -> None:
    assert NVCC is not None
    (sources / "one.cu").write_text('extern "C" __global__ void one(float* x) { *x = 1; }')
    ptx = cubins.build("one", "compute_80", Nvcc(NVCC))
    assert b".target sm_80" in ptx.code and b".entry one(" in ptx.code and ptx.code.endswith(b"\0") and ptx.usage == {}


@needs_nvcc
def test_a_spilled_register_is_reported(sources: Path) -> None:
    """A kernel that needs 200 numbers in 32 registers."""
    assert NVCC is not None
    (sources / "one.cu").write_text("""extern "C" __global__ void __launch_bounds__(1024, 2) one(const float* x, float* y) {
        float values[200];
        #pragma unroll
        for (int i = 0; i < 200; ++i) values[i] = x[threadIdx.x + i * 1024];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 200; ++i) y[threadIdx.x + i * 1024] = values[(i * 7) % 200] * values[i];
    }""")
    usage = cubins.build("one", "sm_90", Nvcc(NVCC)).usage["one"]
    assert usage.spilled > 0 and usage.registers <= 32


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, the only one in which compilers are searched for."""
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    compilers.cache_clear()
    yield tmp_path
    compilers.cache_clear()


def install_nvcc(toolkit: Path) -> None:
    (toolkit / "bin").mkdir()
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text('#!/bin/sh\ncase $1 in --version) echo "release 12.9, V12.9.1";; *) echo sm_80; echo sm_90;; esac\n')
    nvcc.chmod(0o755)


def install_nvrtc(toolkit: Path, library: Path) -> None:
    for name in ("lib64", "include"):
        (toolkit / name).mkdir()
    library.rename(toolkit / "lib64" / library.name)
    (toolkit / "include" / "cuda_fp16.h").touch()


def kinds() -> list[tuple[str, str]]:
    return [(compiler.name, compiler.version) for compiler in compilers()]


def test_nvrtc_comes_before_nvcc(toolkit: Path) -> None:
    library = stand_in(toolkit)
    install_nvcc(toolkit)
    assert kinds() == [("nvcc", "12.9.1")] and compilers()[0].architectures == ("sm_80", "sm_90")
    compilers.cache_clear()
    install_nvrtc(toolkit, library)
    assert kinds() == [("NVRTC", "13.0"), ("nvcc", "12.9.1")]


def test_no_compiler_is_an_error_with_the_reason_for_each(toolkit: Path) -> None:
    with pytest.raises(KdxError, match="cannot be compiled: NVRTC is not installed; nvcc is not installed"):
        compilers()
    library = stand_in(toolkit)
    (toolkit / "lib64").mkdir()
    library.rename(toolkit / "lib64" / library.name)
    with pytest.raises(KdxError, match=r"libnvrtc\.so\.13 lacks the header cuda_fp16\.h; nvcc is not installed"):
        compilers()


@pytest.mark.parametrize("damage", ["not a library", "no functions"])
def test_an_nvrtc_that_does_not_load_leaves_nvcc(damage: str, toolkit: Path) -> None:
    library = stand_in(toolkit, "int other;" if damage == "no functions" else _STAND_IN)
    if damage == "not a library":
        library.write_bytes(b"text")
    install_nvrtc(toolkit, library)
    with pytest.raises(KdxError, match=r"libnvrtc\.so\.13 does not load: .+; nvcc is not installed"):
        compilers()
    install_nvcc(toolkit)
    assert kinds() == [("nvcc", "12.9.1")]


def test_an_nvcc_that_does_not_run_is_an_error_with_its_message(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho nvcc fatal : Cannot find a compiler >&2\nexit 1\n")
    nvcc.chmod(0o755)
    with pytest.raises(KdxError, match="Cannot find a compiler"):
        Nvcc(nvcc)
    nvcc.chmod(0o644)
    with pytest.raises(KdxError, match="Permission denied"):
        Nvcc(nvcc)


_PATH = os.environ.get("PATH", "")

_STAND_IN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct program { char text[4096]; int failed; };
int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 0; return 0; }
int nvrtcGetNumSupportedArchs(int* count) { *count = 2; return 0; }
int nvrtcGetSupportedArchs(int* known) { known[0] = 80; known[1] = 90; return 0; }
int nvrtcCreateProgram(struct program** out, const char* text, const char* name, int n, void* a, void* b) {
    *out = calloc(1, sizeof **out);
    snprintf((*out)->text, 4000, "%s: %s", name, text);
    return n || a || b;
}
int nvrtcCompileProgram(struct program* p, int count, const char** options) {
    for (int i = 0; i < count; ++i) strcat(strcat(p->text, "\n"), options[i]);
    return p->failed = strstr(p->text, "mistake") != 0;
}
static const char* log_of(struct program* p) {
    return p->failed ? "one.cu(1): error: a mistake\n1 error detected" : "Compiling entry function 'one' for\nUsed 3 registers";
}
int nvrtcGetProgramLogSize(struct program* p, size_t* size) { *size = strlen(log_of(p)) + 1; return 0; }
int nvrtcGetProgramLog(struct program* p, char* out) { strcpy(out, log_of(p)); return 0; }
int nvrtcGetCUBINSize(struct program* p, size_t* size) { *size = strlen(p->text); return p->failed; }
int nvrtcGetCUBIN(struct program* p, char* out) { memcpy(out, p->text, strlen(p->text)); return 0; }
int nvrtcGetPTXSize(struct program* p, size_t* size) { *size = strlen(p->text) + 1; return p->failed; }
int nvrtcGetPTX(struct program* p, char* out) { strcpy(out, p->text); return 0; }
int nvrtcDestroyProgram(struct program** p) { free(*p); *p = 0; return 0; }
"""


def stand_in(folder: Path, text: str = _STAND_IN) -> Path:
    """A library with NVRTC's functions, whose machine code is its input. NVRTC itself is tested if it is installed."""
    if shutil.which("gcc", path=_PATH) is None:
        pytest.skip("no gcc")
    source, library = folder / "nvrtc.c", folder / "libnvrtc.so.13"
    source.write_text(text)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True, env=os.environ | {"PATH": _PATH})
    return library


def test_nvrtc_receives_source_and_options(sources: Path, tmp_path: Path) -> None:
    nvrtc = Nvrtc(stand_in(tmp_path), tmp_path / "headers")
    assert (nvrtc.version, nvrtc.architectures) == ("13.0", ("sm_80", "sm_90"))
    cubin = cubins.build("one", "sm_90", nvrtc)
    options = [*FLAGS, f"--include-path={sources}", f"--include-path={tmp_path / 'headers'}"]
    assert cubin.code.decode().splitlines() == ["one.cu: one", "--gpu-architecture=sm_90", *options]
    assert cubin.usage == {"one": Usage(3, 0, 0)}
    ptx = cubins.build("one", "compute_80", nvrtc)
    assert ptx.code.endswith(b"\0") and b"--gpu-architecture=compute_80" in ptx.code and ptx.usage == {}
    (sources / "one.cu").write_text("a mistake")
    with pytest.raises(KdxError, match=r"NVRTC cannot compile one\.cu: one\.cu\(1\): error: a mistake\."):
        cubins.build("one", "sm_90", nvrtc)


@pytest.mark.skipif(NVRTC is None or HEADERS is None, reason="no NVRTC")
def test_nvrtc_compiles_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NVRTC is not None and HEADERS is not None
    monkeypatch.setenv("KDX_CACHE", str(tmp_path))
    nvrtc = Nvrtc(NVRTC, HEADERS)
    for name in cubins.names():
        cubin = cubins.build(name, "sm_90", nvrtc)
        assert cubin.code.startswith(b"\x7fELF") and cubin.usage
        assert not any(usage.spilled for usage in cubin.usage.values())


@pytest.mark.parametrize("source", sorted(path.name for path in cubins.SOURCES.glob("*.cu*")))
def test_no_kernel_needs_a_header_of_the_c_library(source: str) -> None:
    """nvcc includes them by default and NVRTC has none, so this test needs no NVRTC."""
    text = re.sub(r"//.*", "", (cubins.SOURCES / source).read_text())
    macros = r"INFINITY|NAN|HUGE_VALF?|M_[A-Z0-9_]+|(?:FLT|DBL|CHAR|SHRT|INT|LONG|LLONG|UINT|SIZE)_(?:MAX|MIN|EPSILON)"
    assert not re.findall(rf"\b(?:{macros}|std::\w+|u?int(?:8|16|32|64)_t)\b", text)
    assert set(re.findall(r"#include [<\"]([^>\"]+)", text)) <= {"common.cuh", "reduce.cuh", "host/cuda.h", "cuda_bf16.h", "cuda_fp16.h"}
