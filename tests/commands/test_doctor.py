"""The probes of `kdx doctor`: probed reports its own error with a hint, and none stops the others."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from kdx.commands import doctor
from kdx.commands.doctor import Finding, probe
from kdx.errors import KdxError
from kdx.export.engine import ARCHITECTURES
from kdx.kernels import cubins, cuda


def finding_of(name: str) -> Finding:
    (match,) = [finding for finding in probe() if finding.name == name]
    return match


def test_the_results_are_the_packages_own_versions() -> None:
    assert finding_of("Python") == Finding("Python", True, platform.python_version())
    assert finding_of("runtime eager: PyTorch").result.split(",")[0] == torch.__version__
    assert finding_of("runtime onnx: ONNX Runtime").result.startswith(f"{version('onnxruntime')}, ")
    assert "CPU" in finding_of("runtime onnx: ONNX Runtime").result


def test_every_finding_has_a_name_and_one_line() -> None:
    findings = probe()
    assert [finding.name for finding in findings] == list(doctor._PROBES) and len(findings) > 5
    assert all("\n" not in finding.result and finding.result for finding in findings)
    assert all(finding.works or finding.hint for finding in findings)


@pytest.mark.parametrize("name", list(doctor._PROBES))
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("libcuda.so.1: cannot open\nsecond line"), "libcuda.so.1: cannot open"),
        (PackageNotFoundError("x"), "not installed"),
        (OSError(), "OSError"),
        (AttributeError("\n\n"), "AttributeError"),
        (KdxError("It does not work.", "Fix it."), "It does not work"),
        (subprocess.TimeoutExpired("nvcc", 20), "Command 'nvcc' timed out after 20 seconds"),
    ],
)
def test_a_probe_that_raises_is_reported_with_its_hint(name: str, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise error

    def fine() -> str:
        return "works"

    hints = {probed: f"hint {probed}" for probed in doctor._PROBES}
    monkeypatch.setattr(doctor, "_PROBES", {probed: (broken if probed == name else fine, hint) for probed, hint in hints.items()})
    if isinstance(error, KdxError):
        hints[name] = error.hint  # the error has its own hint
    assert probe() == [
        Finding(probed, False, message, hint) if probed == name else Finding(probed, True, "works") for probed, hint in hints.items()
    ]


def test_ctrl_c_is_not_reported_as_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
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
    finding = finding_of(name)
    assert not finding.works and package in finding.result and extra in finding.hint


@pytest.mark.parametrize(("has", "formats"), [(True, "float32 and bfloat16"), (False, "float32; this CPU has no bfloat16")])
def test_openvino_states_whether_the_cpu_has_bfloat16(has: bool, formats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_bfloat16", lambda: has)
    finding = finding_of("runtime openvino: OpenVINO")
    assert finding.works and finding.result == f"{version('openvino')}, {formats}"


def test_tensorrt_rtx_lists_the_architectures_that_it_builds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = finding_of("runtime tensorrt: TensorRT-RTX")
    assert finding.works and finding.result.startswith(f"{version('tensorrt-rtx-cu13')}, builds engines for ")
    assert set(finding.result.split(" for ")[1].split(", ")) == set(ARCHITECTURES)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    finding = finding_of("runtime tensorrt: TensorRT-RTX")
    assert not finding.works and "tensorrt_rtx" in finding.result and "kdx[tensorrt-rtx]" in finding.hint


def test_a_tensorrt_without_its_libraries_names_the_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "version", lambda name: "11.4.0")
    finding = finding_of("runtime tensorrt: TensorRT")
    assert not finding.works and finding.result == "libnvinfer.so.11: cannot open shared object file"


@pytest.mark.parametrize(
    ("gpu", "problem", "message"),
    [(False, "", "PyTorch sees no GPU"), (True, "libcudnn.so.9 is missing", "libcudnn.so.9 is missing"), (True, "", "starts")],
)
def test_the_cuda_provider_is_tried(gpu: bool, problem: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(doctor, "cuda_provider_problem", lambda: problem)
    monkeypatch.setattr(doctor, "_PROBES", {"one": doctor._PROBES["runtime onnx on the GPU"]})
    (finding,) = probe()
    assert finding.works == (gpu and not problem) and finding.result == message
    assert finding.works or "kdx[gpu]" in finding.hint


def test_a_gpu_on_which_pytorch_cannot_compute_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "gpu_problem", lambda: "no kernel image is available")
    monkeypatch.setattr(doctor, "_PROBES", {"GPU": doctor._PROBES["GPU"]})
    (finding,) = probe()
    assert not finding.works and finding.result.endswith("cannot compute on it: no kernel image is available") and "PyTorch" in finding.hint


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("runtime tensorrt: TensorRT", "tensorrt", "tensorrt"),
        ("cuda-bindings", "cuda-bindings", "gpu"),
        ("PyCUDA", "pycuda", "pycuda"),
    ],
)
def test_gpu_packages_without_metadata_are_not_installed(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> str:
        assert distribution == package
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(doctor, "version", absent)
    monkeypatch.setattr(doctor, "_PROBES", {name: doctor._PROBES[name]})
    (finding,) = probe()
    assert (finding.works, finding.result) == (False, "not installed") and f"kdx[{extra}]" in finding.hint


def test_a_machine_without_a_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = finding_of("GPU")
    assert not finding.works and finding.result == "PyTorch sees no GPU" and "driver" in finding.hint


def test_cuda_kernels_work_when_a_gpu_loads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def launcher(device: torch.device) -> object:
        opened.append(device)
        if len(opened) > 1:
            raise KdxError("PyCUDA does not load: libcuda.so.1.", "Install the driver.")
        return object()

    monkeypatch.setattr(doctor, "_PROBES", {"CUDA kernels": doctor._PROBES["CUDA kernels"]})
    monkeypatch.setattr(cuda, "launcher", launcher)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [(finding.works, finding.result) for finding in probe()] == [(False, "PyTorch sees no GPU")] and not opened
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert [(finding.works, finding.result) for finding in probe()] == [(True, f"run on sm_86, kept in {cubins.folder()}")]
    (finding,) = probe()
    assert not finding.works and finding.result == "PyCUDA does not load: libcuda.so.1" and finding.hint == "Install the driver."
    assert opened == [torch.device("cuda")] * 2
