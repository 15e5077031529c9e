"""Every probe is guarded: whatever one raises is its own finding, with its hint, and the others go on."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch

from kdx.commands import doctor
from kdx.commands.doctor import Finding, probe
from kdx.errors import KdxError
from kdx.export.engine import ARCHITECTURES
from kdx.kernels import cubins, cuda


def finding(name: str) -> Finding:
    (found,) = [found for found in probe() if found.name == name]
    return found


def test_what_is_here_is_found_as_its_packages_say() -> None:
    assert finding("Python") == Finding("Python", True, platform.python_version())
    assert finding("runtime eager: PyTorch").found.split(",")[0] == torch.__version__
    assert finding("runtime onnx: ONNX Runtime").found.startswith(f"{version('onnxruntime')}, ")
    assert "CPU" in finding("runtime onnx: ONNX Runtime").found


def test_every_finding_has_a_name_of_its_own_and_one_line() -> None:
    found = probe()
    assert [each.name for each in found] == list(doctor._PROBES) and len(found) > 5
    assert all("\n" not in each.found and each.found for each in found)
    assert all(each.works or each.hint for each in found)


@pytest.mark.parametrize("name", list(doctor._PROBES))
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("libcuda.so.1: cannot open\nsecond line"), "libcuda.so.1: cannot open"),
        (PackageNotFoundError("x"), "not installed"),
        (OSError(), "OSError"),
        (AttributeError("\n\n"), "AttributeError"),
        (subprocess.TimeoutExpired("nvcc", 20), "Command 'nvcc' timed out after 20 seconds"),
    ],
)
def test_a_probe_that_raises_is_reported_with_its_mend(name: str, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise error

    def fine() -> str:
        return "found"

    hints = {each: f"hint {each}" for each in doctor._PROBES}
    monkeypatch.setattr(doctor, "_PROBES", {each: (broken if each == name else fine, hint) for each, hint in hints.items()})
    assert probe() == [Finding(each, False, said, hint) if each == name else Finding(each, True, "found") for each, hint in hints.items()]


def test_ctrl_c_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_PROBES", {"Python": (interrupted, "")})
    with pytest.raises(KeyboardInterrupt):
        probe()


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("runtime onnx: ONNX Runtime", "onnxruntime", "kdx[cpu]"),
        ("runtime openvino: OpenVINO", "openvino", "kdx[openvino]"),
        ("models timm:", "timm", "kdx[models]"),
        ("models torchvision:", "torchvision", "kdx[models]"),
    ],
)
def test_a_package_that_is_not_installed_names_its_extra(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = finding(name)
    assert not found.works and package in found.found and extra in found.hint


@pytest.mark.parametrize(("has", "said"), [(True, "float32 and bfloat16"), (False, "float32; this CPU has no bfloat16")])
def test_openvino_says_whether_the_cpu_has_bfloat16(has: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_bfloat16", lambda: has)
    found = finding("runtime openvino: OpenVINO")
    assert found.works and found.found == f"{version('openvino')}, {said}"


def test_tensorrt_rtx_says_what_it_builds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = finding("runtime tensorrt: TensorRT-RTX")
    assert found.works and found.found.startswith(f"{version('tensorrt-rtx-cu13')}, builds engines for ")
    assert set(found.found.split(" for ")[1].split(", ")) == set(ARCHITECTURES)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    found = finding("runtime tensorrt: TensorRT-RTX")
    assert not found.works and "tensorrt_rtx" in found.found and "tensorrt-rtx-cu13" in found.hint


def test_a_tensorrt_without_its_libraries_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "version", lambda name: "11.4.0")
    found = finding("runtime tensorrt: TensorRT")
    assert not found.works and found.found == "libnvinfer.so.11: cannot open shared object file"


@pytest.mark.parametrize(
    ("compiled", "gpu", "starts", "said"),
    [
        (False, True, False, "built for the CPU only"),
        (True, False, False, "PyTorch sees no GPU"),
        (True, True, False, "its CUDA provider does not start"),
        (True, True, True, "starts"),
    ],
)
def test_a_provider_works_when_a_session_of_it_starts(
    compiled: bool, gpu: bool, starts: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    real = onnxruntime.InferenceSession
    sessions: list[object] = []

    def session(network: bytes, providers: list[str]) -> object:
        sessions.append(real(network, providers=[cpu]))  # the network is one
        return SimpleNamespace(get_providers=lambda: [cuda, cpu] if starts else [cpu])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda, cpu] if compiled else [cpu])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(doctor, "_PROBES", {"one": doctor._PROBES["runtime onnx on the GPU"]})
    (found,) = probe()
    assert found.works == starts and said in found.found and len(sessions) == (compiled and gpu)
    assert starts or "kdx[gpu]" in found.hint


@pytest.mark.parametrize(("name", "package"), [("runtime tensorrt: TensorRT", "tensorrt"), ("PyCUDA", "pycuda")])
def test_the_gpus_packages_are_not_found_where_their_metadata_is_not(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(asked: str) -> str:
        assert asked == package
        raise PackageNotFoundError(asked)

    monkeypatch.setattr(doctor, "version", absent)
    monkeypatch.setattr(doctor, "_PROBES", {name: doctor._PROBES[name]})
    (found,) = probe()
    assert (found.works, found.found) == (False, "not installed") and "kdx[gpu]" in found.hint


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = finding("GPU")
    assert not found.works and found.found == "PyTorch sees no GPU" and "driver" in found.hint


def test_the_cuda_compiler_is_the_one_that_kernels_get(monkeypatch: pytest.MonkeyPatch) -> None:
    made_by = SimpleNamespace(name="nvcc", version="13.0.88", architectures=("sm_80", "sm_90"))
    monkeypatch.setattr(doctor, "_PROBES", {"CUDA compiler": doctor._PROBES["CUDA compiler"]})
    monkeypatch.setattr(cubins, "compiler", lambda: made_by)
    assert probe() == [Finding("CUDA compiler", True, "nvcc 13.0.88, compiles for sm_80, sm_90")]

    def none() -> cubins.Compiler:
        raise KdxError("Nothing here compiles.", "Install it.")

    monkeypatch.setattr(cubins, "compiler", none)
    (found,) = probe()
    assert (found.works, found.found) == (False, "Nothing here compiles") and "nvcc" in found.hint


def test_cuda_kernels_work_when_a_gpu_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def launcher(device: torch.device) -> object:
        opened.append(device)
        if len(opened) > 1:
            raise KdxError("PyCUDA does not load: libcuda.so.1.", "Install the driver.")
        return object()

    monkeypatch.setattr(doctor, "_PROBES", {"CUDA kernels": doctor._PROBES["CUDA kernels"]})
    monkeypatch.setattr(cuda, "launcher", launcher)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [(found.works, found.found) for found in probe()] == [(False, "PyTorch sees no GPU")] and not opened
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert [(found.works, found.found) for found in probe()] == [(True, f"run on sm_86, kept in {cubins.folder()}")]
    (found,) = probe()
    assert not found.works and found.found.startswith("PyCUDA does not load: libcuda.so.1") and "kdx[gpu]" in found.hint
    assert opened == [torch.device("cuda")] * 2
