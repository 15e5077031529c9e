"""The choice of a runtime and device, for every combination of what is installed and requested."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdx.choices import RUNTIMES, RuntimeName
from kdx.errors import KdxError
from kdx.export import engine
from kdx.runtimes.choice import Choice, allows_tf32, choose, open_file
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from tests.runtimes.small_network import CPU


def test_a_file_is_opened_by_its_suffix(path: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here, gpu = Choice("onnx", CPU, ""), Choice("onnx", torch.device("cuda"), "")
    with open_file(path, here) as runner:
        assert (
            isinstance(runner, OnnxRuntimeRunner) and runner.device == CPU and runner.description.networks["network"].reference == "Small"
        )
    for name, message in ((path, "provider cuda"), (built, "TensorRT")):
        with pytest.raises(KdxError, match=f"{message} runs on an NVIDIA GPU, and PyTorch sees none"):
            open_file(name, gpu)
    with pytest.raises(KdxError, match="TensorRT runs on an NVIDIA GPU, not on cpu"):
        open_file(built, here)
    with pytest.raises(KdxError, match=r"neither an \.onnx nor an \.engine file"):
        open_file(tmp_path / "model.pt", here)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with ONNX Runtime and without a GPU."""
    return _machine(monkeypatch, onnx=True, cuda=False)


def _machine(
    monkeypatch: pytest.MonkeyPatch, *, onnx: bool, cuda: bool, provider: bool = False, tensorrt: bool = True, openvino: bool = False
) -> pytest.MonkeyPatch:
    real = importlib.util.find_spec
    some = real("math")
    installed = {"onnxruntime": onnx, "openvino": openvino, "tensorrt": False, "tensorrt_rtx": tensorrt}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (some if installed[name] else None) if name in installed else real(name, *rest)
    )
    only_cpu = "" if provider else "the ONNX Runtime here is built for the CPU only"
    monkeypatch.setattr("kdx.runtimes.choice.cuda_provider_problem", lambda: only_cpu)
    monkeypatch.setattr("kdx.runtimes.choice.gpu_problem", lambda: "")
    monkeypatch.setattr("kdx.runtimes.choice.package_problem", lambda package: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if cuda else 0)
    return monkeypatch


RUNS = {
    # (runtime, device, files, ONNX Runtime, GPU) -> (runtime, device)
    ("auto", "auto", False, True, False): ("onnx", "cpu"),
    ("auto", "cpu", False, True, False): ("onnx", "cpu"),
    ("auto", "auto", False, False, False): ("eager", "cpu"),
    ("auto", "cpu", False, False, False): ("eager", "cpu"),
    ("auto", "auto", False, True, True): ("eager", "cuda"),
    ("auto", "cuda", False, True, True): ("eager", "cuda"),
    ("auto", "cuda:1", False, False, True): ("eager", "cuda:1"),
    ("auto", "cpu", False, True, True): ("onnx", "cpu"),
    ("auto", "cpu", False, False, True): ("eager", "cpu"),
    ("auto", "auto", True, True, False): ("onnx", "cpu"),
    ("auto", "auto", True, True, True): ("onnx", "cpu"),
    ("auto", "cpu", True, True, True): ("onnx", "cpu"),
    ("eager", "auto", False, True, False): ("eager", "cpu"),
    ("eager", "auto", False, False, True): ("eager", "cuda"),
    ("eager", "cpu", False, False, True): ("eager", "cpu"),
    ("eager", "cuda:0", False, True, True): ("eager", "cuda:0"),
    ("onnx", "auto", False, True, False): ("onnx", "cpu"),
    ("onnx", "auto", False, True, True): ("onnx", "cpu"),
    ("onnx", "cpu", True, True, False): ("onnx", "cpu"),
    ("tensorrt", "auto", False, True, True): ("tensorrt", "cuda"),
    ("tensorrt", "cuda:1", True, False, True): ("tensorrt", "cuda:1"),
}
FAILS = {
    ("eager", "auto", True, True, False): "An .onnx file cannot run in PyTorch",
    ("eager", "cpu", True, False, True): "An .onnx file cannot run in PyTorch",
    ("onnx", "auto", False, False, False): "needs the package onnxruntime",
    ("onnx", "auto", False, False, True): "needs the package onnxruntime",
    ("auto", "auto", True, False, False): "needs the package onnxruntime",
    ("onnx", "cuda", False, True, True): "built for the CPU only",
    ("auto", "cuda", True, True, True): "built for the CPU only",
    ("tensorrt", "auto", False, True, False): "TensorRT runs on an NVIDIA GPU, and PyTorch sees none",
    ("tensorrt", "cpu", False, True, True): "TensorRT runs on an NVIDIA GPU, not on cpu",
    ("trt", "auto", False, True, True): "There is no runtime 'trt'",
    ("auto", "cuda", False, True, False): "device 'cuda' cannot run here",
    ("eager", "cuda:1", False, True, False): "device 'cuda:1' cannot run here",
    ("onnx", "cuda", False, True, False): "device 'cuda' cannot run here",
    ("auto", "tpu", False, True, True): "device 'tpu' cannot run here",
    ("auto", "", False, True, False): "device '' cannot run here",
    ("", "auto", False, True, True): "There is no runtime ''",
}


@pytest.mark.parametrize("case", RUNS)
def test_a_choice_that_can_run_is_the_requested_or_the_best_one(
    case: tuple[RuntimeName, str, bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, device, files, onnx, cuda = case
    _machine(monkeypatch, onnx=onnx, cuda=cuda)
    actual = choose(name, device, files=files)
    assert (actual.runtime, str(actual.device)) == RUNS[case]
    assert actual.why.startswith(actual.runtime) and "\n" not in actual.why
    if name != "auto":
        assert "as requested" in actual.why
    elif actual.runtime == "eager" and not cuda:  # the fallback is always explained
        assert "not installed" in actual.why and "kdx[cpu]" in actual.why


@pytest.mark.parametrize("case", FAILS)
def test_a_choice_that_cannot_run_is_an_error_with_a_hint(
    case: tuple[RuntimeName, str, bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, device, files, onnx, cuda = case
    _machine(monkeypatch, onnx=onnx, cuda=cuda)
    with pytest.raises(KdxError) as caught:
        choose(name, device, files=files)
    assert FAILS[case] in caught.value.problem
    assert caught.value.hint and ("kdx[cpu]" in caught.value.hint) == ("package onnxruntime" in caught.value.problem)


@pytest.mark.parametrize(("name", "files"), [("onnx", False), ("onnx", True), ("auto", True)])
def test_onnx_runtime_uses_the_named_gpu_if_it_has_cuda(name: RuntimeName, files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True, provider=True)
    actual = choose(name, "cuda:1", files=files)
    assert (actual.runtime, actual.device) == ("onnx", torch.device("cuda:1")) and actual.why.startswith("onnx on cuda:1")
    assert choose(name, files=files).device == torch.device("cuda")
    _machine(monkeypatch, onnx=True, cuda=True, provider=False)
    assert choose(name, files=files).device == CPU


@pytest.mark.parametrize("onnx", [True, False])
@pytest.mark.parametrize("cuda", [True, False])
def test_openvino_runs_on_the_cpu_on_request_or_if_it_is_alone(onnx: bool, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=onnx, cuda=cuda, openvino=True)
    for device in ("auto", "cpu"):
        for files in (False, True):
            assert choose("openvino", device, files=files) == Choice("openvino", CPU, "openvino on the CPU: as requested")
            actual = choose("auto", device, files=files)
            if device == "auto" and cuda and not files:
                assert actual.runtime == "eager"
            elif onnx:
                assert actual.runtime == "onnx"
            else:
                assert actual == Choice("openvino", CPU, "openvino on the CPU: ONNX Runtime is not installed, and OpenVINO is")
    if cuda:
        with pytest.raises(KdxError, match="OpenVINO runs on the CPU, not on cuda:1"):
            choose("openvino", "cuda:1")
        assert choose("auto", "cuda:1").runtime == "eager"
        with pytest.raises(KdxError, match="package onnxruntime" if not onnx else "built for the CPU only"):
            choose("auto", "cuda:1", files=True)


def test_auto_survives_a_gpu_on_which_pytorch_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True, provider=True)
    monkeypatch.setattr("kdx.runtimes.choice.gpu_problem", lambda: "no kernel image is available")
    why = choose("auto").why
    assert why.startswith("onnx on the CPU: no GPU is in use") and why.endswith(", and not on the GPU (no kernel image is available)")
    assert choose("eager").why == "eager on the CPU: as requested, and not on the GPU (no kernel image is available)"
    assert choose("auto", files=True).device == CPU
    for name in ("auto", "eager", "onnx"):
        with pytest.raises(KdxError, match="sees a GPU but cannot compute on it: no kernel image is available"):
            choose(name, "cuda")
        assert choose(name, "cpu").device == CPU


def test_auto_survives_a_provider_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True, provider=True)
    monkeypatch.setattr("kdx.runtimes.choice.cuda_provider_problem", lambda: "libcudnn.so.9 is missing")
    assert choose("auto").runtime == "eager"
    assert choose("onnx").why == "onnx on the CPU: as requested, and not on the GPU (libcudnn.so.9 is missing)"
    assert choose("auto", files=True).why == "onnx on the CPU: the networks are ONNX files, and not on the GPU (libcudnn.so.9 is missing)"
    with pytest.raises(KdxError, match=r"ONNX Runtime cannot use the GPU: libcudnn\.so\.9 is missing"):
        choose("onnx", "cuda")


def test_auto_survives_an_onnx_runtime_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"onnxruntime": "libonnxruntime.so: cannot open"}
    _machine(monkeypatch, onnx=True, cuda=False, openvino=False)
    monkeypatch.setattr("kdx.runtimes.choice.package_problem", lambda package: broken.get(package, ""))
    assert choose("auto").why.startswith("eager on the CPU: ONNX Runtime does not load (libonnxruntime.so: cannot open)")
    for files in (False, True):
        with pytest.raises(KdxError, match="needs the package onnxruntime, whose import fails: libonnxruntime") as caught:
            choose("onnx", files=files)
        assert "--force-reinstall" in caught.value.hint
    _machine(monkeypatch, onnx=True, cuda=False, openvino=True)
    monkeypatch.setattr("kdx.runtimes.choice.package_problem", lambda package: broken.get(package, ""))
    assert choose("auto").why.startswith(
        "openvino on the CPU: ONNX Runtime does not load (libonnxruntime.so: cannot open), and OpenVINO does"
    )
    broken["openvino"] = "no symbol"
    assert choose("auto").runtime == "eager"
    with pytest.raises(KdxError, match="needs the package openvino, whose import fails: no symbol"):
        choose("openvino")


def test_auto_survives_a_pytorch_that_cannot_look_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("CUDA driver initialization failed")

    _machine(monkeypatch, onnx=False, cuda=True)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert choose("auto").device == CPU


def test_openvino_that_is_not_installed_names_its_extra(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(KdxError, match="The runtime openvino needs the package openvino") as caught:
        choose("openvino")
    assert "kdx[openvino]" in caught.value.hint


@pytest.mark.parametrize("name", ["auto", "eager", "onnx", "tensorrt"])
def test_only_openvino_supports_bfloat16(name: RuntimeName, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=name == "tensorrt", openvino=True)
    monkeypatch.setattr("kdx.runtimes.openvino.has_bfloat16", lambda: True)
    with pytest.raises(KdxError, match=f"runtime {'onnx' if name == 'auto' else name} does not support bfloat16") as caught:
        choose(name, precision="bfloat16")
    assert "--runtime openvino" in caught.value.hint
    actual = choose("openvino", precision="bfloat16")
    assert (actual.precision, actual.why) == ("bfloat16", "openvino on the CPU: as requested, in bfloat16")
    with pytest.raises(KdxError, match="There is no precision 'float16'"):
        choose(name, precision="float16")  # type: ignore[arg-type]


def test_a_cpu_without_bfloat16_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=False, cuda=False, openvino=True)
    monkeypatch.setattr("kdx.runtimes.openvino.has_bfloat16", lambda: False)
    for name in ("openvino", "auto"):
        assert choose(name).precision == "float32"
        with pytest.raises(KdxError, match="This CPU does not compute in bfloat16"):
            choose(name, precision="bfloat16")


def test_engines_run_only_in_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True)
    for name in ("auto", "tensorrt"):
        actual = choose(name, files=True, engines=True)
        assert (actual.runtime, actual.device) == ("tensorrt", torch.device("cuda"))
    assert "the networks are engines" in choose("auto", engines=True).why
    for name in ("eager", "onnx", "openvino"):
        with pytest.raises(KdxError, match=f"An .engine file cannot run in {name}"):
            choose(name, files=True, engines=True)  # type: ignore[arg-type]
    _machine(monkeypatch, onnx=True, cuda=True, tensorrt=False)
    with pytest.raises(KdxError, match="needs the package tensorrt") as caught:
        choose("tensorrt")
    assert "kdx[tensorrt]" in caught.value.hint


@pytest.mark.parametrize("device", ["cuda:x", "cuda:-1", "cuda:2", "cuda:", "cudax"])
def test_a_gpu_that_pytorch_does_not_see_is_an_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True)
    with pytest.raises(KdxError, match="cannot run here"):
        choose("eager", device)


def test_the_same_choice_compares_equal(machine: pytest.MonkeyPatch) -> None:
    assert choose("auto") == choose("auto", "auto") == Choice("onnx", CPU, choose("auto").why)
    assert RUNTIMES == ("auto", "eager", "onnx", "openvino", "tensorrt")


def test_tensor_float_32_needs_a_gpu_and_a_runtime_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True, provider=True, tensorrt=True)
    for name in ("auto", "eager", "onnx", "tensorrt"):
        actual = choose(name, precision="tf32")
        assert actual.precision == "tf32" and actual.device.type == "cuda" and actual.why.endswith(", in tf32")
        with pytest.raises(KdxError, match="on cpu"):
            choose(name, "cpu", precision="tf32")
    with pytest.raises(KdxError, match="tensorrt does not support tf32"):
        choose("tensorrt", precision="tf32", engines=True)
    with pytest.raises(KdxError, match="openvino does not support tf32"):
        _machine(monkeypatch, onnx=True, cuda=True, openvino=True)
        choose("openvino", precision="tf32")


@pytest.mark.parametrize("built_with", [False, True])
def test_an_engine_has_the_setting_that_it_was_built_with(built: Path, built_with: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    described = replace(engine.describe(built), tf32=built_with)
    monkeypatch.setattr(engine, "describe", lambda path: described)
    plain = Choice("tensorrt", torch.device("cuda"), "")
    assert allows_tf32(plain, [None, "timm:resnet18", "a.onnx", built]) == built_with and not allows_tf32(plain, ["a.onnx"])
    assert allows_tf32(replace(plain, precision="tf32"), [None])
