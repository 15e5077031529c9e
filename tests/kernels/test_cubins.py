"""Every kernel compiles without spilling a register, and the cache of machine code neither forgets nor mixes up."""

from __future__ import annotations

import hashlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdx.errors import KdxError
from kdx.kernels import __main__ as command
from kdx.kernels import cubins
from kdx.kernels.cubins import Compiler, Cubin, Nvcc, Nvrtc, Usage

NVCC = cubins._find_nvcc()
NVRTC = cubins._find_nvrtc()
HEADERS = cubins._find_headers()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 0 barriers
ptxas info    : Compiling entry function 'second_1' for 'sm_90'
ptxas info    : Function properties for second_1
    40 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem
"""


class FakeCompiler:
    """Gives the text of the source, and counts."""

    name = "fake"
    architectures: tuple[str, ...] = ("sm_80", "sm_86", "sm_90")

    def __init__(self, version: str = "1.0") -> None:
        self.version = version
        self.calls = 0

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        self.calls += 1
        return f"{architecture} {source.read_text()}".encode(), LOG


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources of its own, and a cache of its own; no compiler but those that a test names."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cu").write_text("one")
    (folder / "common.cuh").write_text("common")
    monkeypatch.setattr(cubins, "SOURCES", folder)
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "cache"))
    return folder


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "cubins").glob("*.cubin"))


# ---- the kernels themselves ----


def compiled(architecture: str) -> dict[str, Cubin]:
    assert NVCC is not None
    nvcc = Nvcc(NVCC)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cubins.names(), pool.map(lambda name: cubins.build(name, architecture, nvcc), cubins.names()), strict=True))


@needs_nvcc
@pytest.mark.parametrize("architecture", [pytest.param(name, marks=[] if name == "sm_90" else pytest.mark.slow) for name in ARCHITECTURES])
def test_every_kernel_compiles_and_spills_nothing(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDX_CACHE", str(tmp_path))
    for name, cubin in compiled(architecture).items():
        assert cubin.code.startswith(b"\x7fELF")
        kernels = set(cubin.usage)
        assert kernels and all(kernel.encode() in cubin.code for kernel in kernels)
        for kernel, usage in cubin.usage.items():
            assert usage.spilled == 0 and 0 < usage.registers <= 255, f"{kernel} of {name}.cu on {architecture}: {usage}"


@needs_nvcc
def test_a_mistake_in_a_source_is_the_compilers_own_words(sources: Path) -> None:
    assert NVCC is not None
    (sources / "one.cu").write_text('extern "C" __global__ void one(float* x) { *x = undeclared; }')
    with pytest.raises(KdxError, match=r'nvcc cannot compile one\.cu: .*identifier "undeclared" is undefined'):
        cubins.build("one", "sm_90", Nvcc(NVCC))


@needs_nvcc
def test_a_spilled_register_is_seen(sources: Path) -> None:
    """A kernel that holds 200 numbers in 32 registers."""
    assert NVCC is not None
    (sources / "one.cu").write_text("""extern "C" __global__ void __launch_bounds__(1024, 2) one(const float* x, float* y) {
        float held[200];
        #pragma unroll
        for (int i = 0; i < 200; ++i) held[i] = x[threadIdx.x + i * 1024];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 200; ++i) y[threadIdx.x + i * 1024] = held[(i * 7) % 200] * held[i];
    }""")
    usage = cubins.build("one", "sm_90", Nvcc(NVCC)).usage["one"]
    assert usage.spilled > 0 and usage.registers <= 32


def test_ptxas_is_read() -> None:
    assert cubins.usage(LOG) == {"first": Usage(14, 0, 0), "second_1": Usage(255, 40, 28)}
    with pytest.raises(ValueError, match="nothing of registers"):
        cubins.usage(LOG.replace("Used 14", "Uses 14"))


# ---- the cache ----


def test_what_is_built_is_kept(sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler = FakeCompiler()
    with caplog.at_level("INFO", "kdx"):
        first = cubins.build("one", "sm_90", compiler)
    assert [record.getMessage() for record in caplog.records] == ["fake compiles one.cu for sm_90, once for this version of it"]
    assert first == Cubin(b"sm_90 one", {"first": Usage(14, 0, 0), "second_1": Usage(255, 40, 28)})
    assert cubins.build("one", "sm_90", compiler) == first and compiler.calls == 1 and len(entries(tmp_path)) == 1


@pytest.mark.parametrize("changed", ["source", "header", "another header", "flags", "architecture", "compiler", "release"])
def test_whatever_a_cubin_is_made_of_makes_another(changed: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.build("one", "sm_90", FakeCompiler())
    compiler, architecture = FakeCompiler(), "sm_90"
    if changed == "source":
        (sources / "one.cu").write_text("another")
    elif changed == "header":
        (sources / "common.cuh").write_text("another")
    elif changed == "another header":
        (sources / "more.cuh").write_text("")
    elif changed == "flags":
        monkeypatch.setattr(cubins, "FLAGS", (*cubins.FLAGS, "--use_fast_math"))
    elif changed == "architecture":
        architecture = "sm_80"
    elif changed == "compiler":
        compiler.version = "1.1"
    else:
        monkeypatch.setattr(cubins, "version", lambda name: "99")
    expected = compiler.compile(sources / "one.cu", architecture)[0]
    assert cubins.build("one", architecture, compiler).code == expected
    assert compiler.calls == 2 and len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:-1],
        lambda whole: whole[:20],
        lambda whole: whole[:-1] + b"!",
        lambda whole: b"\xff" + whole,
        lambda whole: b"[]\n" + whole,
        lambda whole: b'{"sha256": "%s", "usage": {"one": {}}}\n' % hashlib.sha256(b"").hexdigest().encode(),
    ],
)
def test_a_damaged_entry_is_made_again(damage: Callable[[bytes], bytes], sources: Path, tmp_path: Path) -> None:
    compiler = FakeCompiler()
    whole = cubins.build("one", "sm_90", compiler)
    (entry,) = entries(tmp_path)
    stored = entry.read_bytes()
    entry.write_bytes(damage(stored))
    assert cubins.build("one", "sm_90", compiler) == whole and compiler.calls == 2
    assert entry.read_bytes() == stored


_PROCESS = """
import sys, time, types
from pathlib import Path

for name, folder in (("kdx", "kdx"), ("kdx.kernels", "kernels")):  # the packages without their other modules, which take seconds
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{sys.argv[4]}/{folder}"]
from kdx.kernels import cubins

class Slow:
    name, version, architectures = "slow", "1", ("sm_90",)

    def compile(self, source, architecture):
        with Path(sys.argv[2]).open("a") as calls:
            calls.write("call\\n")
        time.sleep(float(sys.argv[3]))
        return b"code", ""

cubins.SOURCES = Path(sys.argv[1])
print(cubins.build("one", "sm_90", Slow()).code.decode())
"""


def process(sources: Path, calls: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [str(sources), str(calls), str(seconds), str(Path(__file__).parents[2])]
    return subprocess.Popen([sys.executable, "-c", _PROCESS, *arguments], stdout=subprocess.PIPE, text=True)


def test_processes_at_once_compile_once_and_a_killed_one_leaves_nothing_behind(sources: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    killed = process(sources, calls, 60)
    while not calls.exists():
        time.sleep(0.02)
        assert killed.poll() is None
    others = [process(sources, calls, 0.2) for _ in range(2)]  # wait for the first, then for one another
    killed.kill()
    killed.communicate()
    assert [other.communicate()[0] for other in others] == ["code\n", "code\n"] and [other.returncode for other in others] == [0, 0]
    assert calls.read_text() == "call\n" * 2  # the killed one's, and one more
    assert [cubins._read(entry) for entry in entries(tmp_path)] == [Cubin(b"code", {})]


def test_threads_at_once_compile_once(sources: Path) -> None:
    class Meeting(FakeCompiler):
        def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
            time.sleep(0.1)
            return super().compile(source, architecture)

    compiler = Meeting()
    threads = [threading.Thread(target=cubins.build, args=("one", "sm_90", compiler)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.calls == 1


def test_a_write_that_breaks_off_leaves_no_entry(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    compiler = FakeCompiler()
    with monkeypatch.context() as patch, pytest.raises(KdxError, match=r"cannot be kept in .*No space left(.|\n)*KDX_CACHE"):
        patch.setattr(Path, "write_bytes", full)
        cubins.build("one", "sm_90", compiler)
    assert not entries(tmp_path)
    assert cubins.build("one", "sm_90", compiler).code == b"sm_90 one" and len(entries(tmp_path)) == 1
    assert {path.suffix for path in entries(tmp_path)[0].parent.iterdir()} == {".cubin", ".lock"}


def test_the_cache_is_where_the_platform_wants_it_or_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KDX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cubins.folder() == Path.home() / ".cache" / "kdx" / "cubins"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cubins.folder() == tmp_path / "kdx" / "cubins"
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "chosen"))
    assert cubins.folder() == tmp_path / "chosen" / "cubins"


def test_a_cache_that_cannot_be_written_is_named(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(KdxError, match=r"cannot be kept in .*cache(.|\n)*KDX_CACHE"):
        cubins.build("one", "sm_90", FakeCompiler())


# ---- the device's choice ----


def use(compiler: Compiler | KdxError, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Compiler:
        if isinstance(compiler, KdxError):
            raise compiler
        return compiler

    monkeypatch.setattr(cubins, "compiler", found)


def test_a_device_gets_its_own_architecture_or_an_older_one_of_its_generation(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeCompiler(), monkeypatch)
    assert [cubins.load("one", capability).code.split()[0] for capability in ((8, 0), (8, 6), (8, 9), (9, 0))] == [
        *(b"sm_80", b"sm_86", b"sm_86", b"sm_90")
    ]
    with pytest.raises(KdxError, match=r"fake 1\.0 does not compile for sm_100(.|\n)*sm_80, sm_86, sm_90"):
        cubins.load("one", (10, 0))


def test_without_a_compiler_what_was_built_ahead_will_do(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = KdxError("Nothing here compiles.", "Install something.")
    use(nothing, monkeypatch)
    with pytest.raises(KdxError, match="Nothing here compiles"):
        cubins.load("one", (8, 6))
    cubins.build("one", "sm_80", FakeCompiler())
    assert cubins.load("one", (8, 6)).code == b"sm_80 one"
    for damaged in entries(tmp_path):
        damaged.write_bytes(b"")
    with pytest.raises(KdxError, match="Nothing here compiles"):
        cubins.load("one", (8, 6))
    cubins.build("one", "sm_80", FakeCompiler())
    (sources / "one.cu").write_text("newer")
    with pytest.raises(KdxError, match="Nothing here compiles"):
        cubins.load("one", (8, 6))


def test_an_unknown_source_is_a_programmers_mistake(sources: Path) -> None:
    with pytest.raises(ValueError, match="no kernels 'two': one"):
        cubins.build("two", "sm_90", FakeCompiler())


# ---- compilers ----


def test_nvcc_comes_before_nvrtc_and_neither_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = stand_in(tmp_path)
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cubins.compiler.cache_clear()
    try:
        with pytest.raises(KdxError, match="neither nvcc nor NVRTC is there"):
            cubins.compiler()
        (tmp_path / "lib64").mkdir()
        library.rename(tmp_path / "lib64" / library.name)
        with pytest.raises(KdxError, match=r"lacks cuda_fp16\.h"):
            cubins.compiler()
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "cuda_fp16.h").touch()
        assert cubins.compiler().name == "NVRTC"
        cubins.compiler.cache_clear()
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text('#!/bin/sh\ncase $1 in --version) echo "release 12.9, V12.9.1";; *) echo sm_80; echo sm_90;; esac\n')
        nvcc.chmod(0o755)
        found = cubins.compiler()
        assert (found.name, found.version, found.architectures) == ("nvcc", "12.9.1", ("sm_80", "sm_90"))
    finally:
        cubins.compiler.cache_clear()


def test_an_nvcc_that_does_not_run_is_an_error_with_its_words(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho nvcc fatal : Cannot find a compiler >&2\nexit 1\n")
    nvcc.chmod(0o755)
    with pytest.raises(KdxError, match="Cannot find a compiler"):
        Nvcc(nvcc)
    nvcc.chmod(0o644)
    with pytest.raises(KdxError, match="Permission denied"):
        Nvcc(nvcc)


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
int nvrtcDestroyProgram(struct program** p) { free(*p); *p = 0; return 0; }
"""


def stand_in(folder: Path) -> Path:
    """A library with NVRTC's functions, whose machine code is what it was given; NVRTC itself is tested where it is."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    source, library = folder / "nvrtc.c", folder / "libnvrtc.so.13"
    source.write_text(_STAND_IN)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def test_nvrtc_is_called_as_it_wants_to_be(sources: Path, tmp_path: Path) -> None:
    """By a stand-in."""
    nvrtc = Nvrtc(stand_in(tmp_path), tmp_path / "headers")
    assert (nvrtc.version, nvrtc.architectures) == ("13.0", ("sm_80", "sm_90"))
    made = cubins.build("one", "sm_90", nvrtc)
    options = [*cubins.FLAGS, f"--include-path={sources}", f"--include-path={tmp_path / 'headers'}"]
    assert made.code.decode().splitlines() == ["one.cu: one", "--gpu-architecture=sm_90", *options]
    assert made.usage == {"one": Usage(3, 0, 0)}
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


# ---- python -m kdx.kernels ----


def test_build_compiles_everything_and_says_what_each_kernel_takes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (sources / "two.cu").write_text("two")
    compiler = FakeCompiler()
    use(compiler, monkeypatch)
    assert command.main(["build", "--arch", "sm_80, sm_90,sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert compiler.calls == 4 and len(entries(tmp_path)) == 4
    assert lines[0] == f"fake 1.0, into {cubins.folder()}"
    assert [line.split() for line in lines[1:3]] == [
        ["one", "sm_80", "first", "14", "registers"],
        ["one", "sm_80", "second_1", "255", "registers,", "28", "bytes", "spilled"],
    ]
    assert [tuple(line.split()[:2]) for line in lines[1::2]] == [(name, arch) for name in ("one", "two") for arch in ("sm_80", "sm_90")]


@pytest.mark.parametrize("given", ["sm_35", "sm_90,90", ""])
def test_build_names_an_architecture_that_it_does_not_know(
    given: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(FakeCompiler(), monkeypatch)
    assert command.main(["build", "--arch", given]) == 2
    said = capsys.readouterr().err
    assert f"does not compile for {given.split(',')[-1]!r}" in said and "It knows sm_80, sm_86, sm_90." in said
    assert not entries(tmp_path)


def test_the_command_is_the_files_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kdx.kernels", "build", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command.__file__, run_name="__main__")
    assert ended.value.code == 0 and "--arch" in capsys.readouterr().out
