"""The package that builds an engine, and the timings that TensorRT keeps."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdx.errors import KdxError
from kdx.export import engine
from kdx.export.engine import EngineDescription
from tests.export.engine.files import left_in


def _machine(monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, *, tensorrt: bool) -> None:
    real = importlib.util.find_spec
    spec = real("math") if tensorrt else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == "tensorrt" else real(name, *rest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")


@pytest.mark.parametrize(
    ("arch", "gpu", "tensorrt", "expected"),
    [
        ("sm_86", None, False, ("tensorrt_rtx", "sm_86", None)),
        ("sm_86", (8, 6), True, ("tensorrt_rtx", "sm_86", None)),
        (None, (8, 6), True, ("tensorrt", "sm_86", "A GPU")),
        (None, (9, 0), True, ("tensorrt", "sm_90", "A GPU")),
        (None, (12, 0), False, ("tensorrt_rtx", "sm_120", None)),
    ],
)
def test_the_package_that_builds(
    arch: str | None,
    gpu: tuple[int, int] | None,
    tensorrt: bool,
    expected: tuple[str, str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _machine(monkeypatch, gpu, tensorrt=tensorrt)
    target = engine.choose_target(arch)
    assert (target.package, target.arch, target.gpu) == expected
    assert target.why.startswith("TensorRT-RTX" if target.package == "tensorrt_rtx" else "TensorRT,")


def test_the_error_has_a_hint_if_no_package_can_build(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, None, tensorrt=True)
    with pytest.raises(KdxError, match="sees none here") as caught:
        engine.choose_target()
    assert "sm_86" in caught.value.hint
    _machine(monkeypatch, (9, 0), tensorrt=False)
    with pytest.raises(KdxError, match="An engine for sm_90 needs the package tensorrt") as caught:
        engine.choose_target()
    assert "kdx[tensorrt]" in caught.value.hint


@pytest.mark.parametrize(("name", "hint"), [("tensorrt_rtx", "kdx[tensorrt-rtx]"), ("tensorrt", "kdx[tensorrt]")])
def test_the_error_for_a_missing_or_broken_package_names_its_installation(
    name: Any, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KdxError, match=f"The package {name} cannot be loaded") as caught:
        engine.load_package(name)
    assert hint in caught.value.hint
    monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{name}.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KdxError, match=r"libnvinfer\.so\.11: cannot open") as caught:
        engine.load_package(name)
    assert hint in caught.value.hint


class Config:
    """The behaviour of TensorRT's builder configuration with a timing cache."""

    def __init__(self, fits: bool) -> None:
        self.fits = fits
        self.content = b""

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: data + b" and more", data=data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if self.fits or not cache.data:
            self.content = cache.data
            self.cache = cache
        return self.fits or not cache.data

    def get_timing_cache(self) -> Any:
        return self.cache


@pytest.mark.parametrize("fits", [True, False])
def test_timings_continue_from_the_last_build_or_start_empty(fits: bool, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "timings"
    config = Config(fits)
    engine._load_timings(config, path)
    assert config.content == b""
    engine._save_timings(config, path)
    assert path.read_bytes() == b" and more" and left_in(path.parent) == ["timings"]
    engine._load_timings(config, path)
    assert config.content == (b" and more" if fits else b"")


def test_timings_that_cannot_be_written_do_not_fail_the_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    config = Config(True)
    engine._load_timings(config, tmp_path / "file" / "timings")
    with caplog.at_level("INFO", "kdx"):
        engine._save_timings(config, tmp_path / "file" / "timings")
    assert "were not kept" in caplog.text and left_in(tmp_path) == ["file"]


def test_timings_are_in_the_users_cache_folder(
    built: tuple[Path, EngineDescription], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = replace(built[1], package="tensorrt", version="11.4.0", gpu="NVIDIA H200 / 141 GB")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine._timing_cache(described) == tmp_path / "kdx" / "timings-11.4.0-NVIDIA-H200-141-GB.cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert engine._timing_cache(described).parent == tmp_path / "home" / ".cache" / "kdx"


@pytest.mark.slow
def test_a_build_writes_only_its_files(fixed: Path, tmp_path: Path) -> None:
    """In a fresh process: its cache, home and working folders stay empty, and it prints nothing."""
    code = "import sys; from pathlib import Path; from kdx.export import engine; engine.build(*map(Path, sys.argv[1:]), {})"
    code = code.replace("{}", "batch=(2, 3, 4), arch='sm_121'")
    places = {name: tmp_path / name for name in ("XDG_CACHE_HOME", "HOME", "TMPDIR")}
    for place in places.values():
        place.mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(fixed), str(tmp_path / "out" / "a.engine")],
        cwd=places["HOME"],
        env=os.environ | {name: str(place) for name, place in places.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [left_in(place) for place in places.values()] == [[], [], []]
