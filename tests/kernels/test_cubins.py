"""Every kernel compiles without spilling registers, and the cache of machine code returns the right entries."""

from __future__ import annotations

import hashlib
import runpy
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
from kdx.kernels.compilers import FLAGS, Compiler, Nvcc, find_nvcc
from kdx.kernels.cubins import Cubin, Usage

NVCC = find_nvcc()
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
    """Returns the text of the source as machine code, and counts its calls."""

    name = "fake"
    architectures: tuple[str, ...] = ("sm_80", "sm_86", "sm_90")

    def __init__(self, version: str = "1.0") -> None:
        self.version = version
        self.calls = 0

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        self.calls += 1
        return f"{architecture} {source.read_text()}".encode(), LOG


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "cubins").glob("*.cubin"))


# ---- the kernels themselves ----


def compiled(architecture: str) -> dict[str, Cubin]:
    assert NVCC is not None
    nvcc = Nvcc(NVCC)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cubins.names(), pool.map(lambda name: cubins.build(name, architecture, nvcc), cubins.names()), strict=True))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_spills_nothing(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDX_CACHE", str(tmp_path))
    for name, cubin in compiled(architecture).items():
        assert cubin.code.startswith(b"\x7fELF")
        kernels = set(cubin.usage)
        assert kernels and all(kernel.encode() in cubin.code for kernel in kernels)
        for kernel, usage in cubin.usage.items():
            assert usage.spilled == 0 and 0 < usage.registers <= 255, f"{kernel} of {name}.cu on {architecture}: {usage}"


def test_the_log_of_ptxas_is_read() -> None:
    assert cubins.usage(LOG) == {"first": Usage(14, 0, 0), "second_1": Usage(255, 40, 28)}
    with pytest.raises(ValueError, match="no number of registers"):
        cubins.usage(LOG.replace("Used 14", "Uses 14"))


# ---- the cache ----


def test_builds_are_cached(sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler = FakeCompiler()
    with caplog.at_level("INFO", "kdx"):
        first = cubins.build("one", "sm_90", compiler)
    assert [record.getMessage() for record in caplog.records] == ["fake compiles one.cu for sm_90, once for this version of it"]
    assert first == Cubin(b"sm_90 one", {"first": Usage(14, 0, 0), "second_1": Usage(255, 40, 28)})
    assert cubins.build("one", "sm_90", compiler) == first and compiler.calls == 1 and len(entries(tmp_path)) == 1


@pytest.mark.parametrize("changed", ["source", "header", "another header", "flags", "architecture", "compiler", "release"])
def test_every_input_of_a_cubin_changes_its_entry(changed: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.build("one", "sm_90", FakeCompiler())
    compiler, architecture = FakeCompiler(), "sm_90"
    if changed == "source":
        (sources / "one.cu").write_text("another")
    elif changed == "header":
        (sources / "common.cuh").write_text("another")
    elif changed == "another header":
        (sources / "more.cuh").write_text("")
    elif changed == "flags":
        monkeypatch.setattr(cubins, "FLAGS", (*FLAGS, "--use_fast_math"))
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

for name, folder in (("kdx", "kdx"), ("kdx.kernels", "kernels")):  # the packages without their other modules, which take seconds to import
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
    others = [process(sources, calls, 0.2) for _ in range(2)]  # they wait for the first process, then for one another
    killed.kill()
    killed.communicate()
    assert [other.communicate()[0] for other in others] == ["code\n", "code\n"] and [other.returncode for other in others] == [0, 0]
    assert calls.read_text() == "call\n" * 2  # the killed process's call, and one more
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


def test_a_failed_write_leaves_no_entry(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    compiler = FakeCompiler()
    with monkeypatch.context() as patch, pytest.raises(KdxError, match=r"cannot be cached in .*No space left(.|\n)*KDX_CACHE"):
        patch.setattr(Path, "write_bytes", full)
        cubins.build("one", "sm_90", compiler)
    assert not entries(tmp_path)
    assert cubins.build("one", "sm_90", compiler).code == b"sm_90 one" and len(entries(tmp_path)) == 1
    assert {path.suffix for path in entries(tmp_path)[0].parent.iterdir()} == {".cubin", ".lock"}


def test_the_cache_is_in_the_platforms_folder_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KDX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cubins.folder() == Path.home() / ".cache" / "kdx" / "cubins"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cubins.folder() == tmp_path / "kdx" / "cubins"
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "chosen"))
    assert cubins.folder() == tmp_path / "chosen" / "cubins"


def test_a_cache_that_cannot_be_written_is_an_error(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(KdxError, match=r"cannot be cached in .*cache(.|\n)*KDX_CACHE"):
        cubins.build("one", "sm_90", FakeCompiler())


# ---- the architecture for a device ----


def use(compiler: Compiler | KdxError, monkeypatch: pytest.MonkeyPatch, *others: Compiler) -> None:
    def installed() -> tuple[Compiler, ...]:
        if isinstance(compiler, KdxError):
            raise compiler
        return (compiler, *others)

    monkeypatch.setattr(cubins, "compilers", installed)
    monkeypatch.setattr(command, "compilers", installed)


def codes(*capabilities: tuple[int, int]) -> list[bytes]:
    """The architectures whose code devices of these capabilities get."""
    return [cubins.load("one", capability).code.split()[0] for capability in capabilities]


def test_a_device_gets_its_own_architecture_or_an_older_one_of_its_generation(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeCompiler(), monkeypatch)
    assert codes((8, 0), (8, 6), (8, 9), (9, 0)) == [b"sm_80", b"sm_86", b"sm_86", b"sm_90"]
    with pytest.raises(KdxError, match=r"No installed compiler supports sm_75: fake 1\.0 supports sm_80, sm_86, sm_90"):
        cubins.load("one", (7, 5))


def test_a_device_newer_than_the_compilers_gets_ptx(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeCompiler(), monkeypatch)
    assert codes((10, 0), (12, 1)) == [b"compute_90", b"compute_90"]
    newer = FakeCompiler("2.0")
    newer.architectures = ("sm_90", "sm_100")
    use(FakeCompiler(), monkeypatch, newer)  # the machine code of the second compiler is better than the PTX of the first
    assert codes((9, 0), (10, 3), (12, 0)) == [b"sm_90", b"sm_100", b"compute_100"]
    assert newer.calls == 2


class Failing(FakeCompiler):
    """A compiler that starts but does not compile, like nvcc without a C++ compiler."""

    name = "failing"

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        raise KdxError(f"It does not compile for {architecture}.", "Fix it.")


def test_a_compiler_that_fails_leaves_the_source_to_the_next(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Failing(), monkeypatch, FakeCompiler())
    assert codes((9, 0)) == [b"sm_90"]
    use(Failing(), monkeypatch)
    assert codes((9, 0)) == [b"sm_90"]  # from the cache
    with pytest.raises(KdxError, match="It does not compile for sm_80"):
        cubins.load("one", (8, 0))


def test_without_a_compiler_an_entry_built_ahead_is_used(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    cubins.build("one", "compute_80", FakeCompiler())
    assert codes((9, 0)) == [b"compute_80"]
    cubins.build("one", "sm_80", FakeCompiler())
    (sources / "one.cu").write_text("newer")
    with pytest.raises(KdxError, match="Nothing here compiles"):
        cubins.load("one", (8, 6))


def test_a_system_without_locks_compiles_with_a_warning(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows does not have fcntl."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    use(FakeCompiler(), monkeypatch)
    assert codes((9, 0)) == [b"sm_90"]
    assert "cannot be locked" in caplog.text


def test_an_unknown_source_is_a_programmers_mistake(sources: Path) -> None:
    with pytest.raises(ValueError, match="no source 'two'; there are one"):
        cubins.build("two", "sm_90", FakeCompiler())


# ---- python -m kdx.kernels ----


def test_build_compiles_everything_and_prints_the_usage_of_each_kernel(
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


def test_build_compiles_ptx_for_later_gpus(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compiler = FakeCompiler()
    compiler.compile = lambda source, architecture: (b"PTX", "")  # type: ignore[method-assign]
    use(compiler, monkeypatch)
    assert command.main(["build", "--arch", "compute_90"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(" compute_90 PTX, which the driver of a GPU compiles")


@pytest.mark.parametrize("architectures", ["sm_35", "sm_90,90", ""])
def test_build_names_an_unknown_architecture(
    architectures: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(FakeCompiler(), monkeypatch)
    assert command.main(["build", "--arch", architectures]) == 2
    message = capsys.readouterr().err
    assert f"does not compile for {architectures.split(',')[-1]!r}" in message and "Choose among sm_80, sm_86, sm_90." in message
    assert not entries(tmp_path)


def test_the_module_runs_as_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kdx.kernels", "build", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(command.__file__, run_name="__main__")
    assert exit_.value.code == 0 and "--arch" in capsys.readouterr().out
