"""The choice of a runtime and a device."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdx.choices import PRECISIONS, RUNTIMES, Precision, RuntimeName
from kdx.errors import KdxError, missing_package
from kdx.export import engine
from kdx.export.description import Description, describe
from kdx.runtimes.cuda_stream import CPU, check_gpu
from kdx.runtimes.onnx_runtime import GPU_PACKAGE, OnnxRuntimeRunner, has_cuda_provider
from kdx.runtimes.openvino import OpenVinoRunner, check_precision
from kdx.runtimes.runner import FileRunner
from kdx.runtimes.tensorrt import TensorRtRunner


def is_file(given: object) -> bool:
    """Whether a network is given as a file that ``kdx export`` wrote, by its path."""
    return isinstance(given, str | Path) and str(given).endswith((".onnx", ".engine"))


def describe_file(path: Path) -> Description:
    """What a file that kdx exported says of itself, .onnx or .engine."""
    return engine.describe(path).file if path.suffix == ".engine" else describe(path)


@dataclass(frozen=True)
class Choice:
    """The runtime, device and precision to use, and why in one line."""

    runtime: str
    device: torch.device
    why: str
    precision: Precision = "float32"


def open_file(path: Path, choice: Choice) -> FileRunner:
    """The runner of a file by its suffix: .onnx in OpenVINO or ONNX Runtime, as was chosen; .engine in TensorRT."""
    if path.suffix == ".engine":
        return TensorRtRunner(path, choice.device)
    if path.suffix != ".onnx":
        raise KdxError(f"{path} is neither an .onnx nor an .engine file.", "Give a file that kdx export wrote.")
    if choice.runtime == "openvino":
        return OpenVinoRunner(path, precision=choice.precision)
    return OnnxRuntimeRunner(path, "cpu" if choice.device.type == "cpu" else "cuda", choice.device)


def choose(
    runtime: RuntimeName, device: str = "auto", *, precision: Precision = "float32", files: bool = False, engines: bool = False
) -> Choice:
    """Resolve ``auto``; a runtime, device or precision asked for by name that cannot run here is a KdxError.

    files: the networks are given as files, so PyTorch cannot run them. engines: as .engine files, so only TensorRT can.
    """
    if precision not in PRECISIONS:
        raise KdxError(f"There is no precision {precision!r}.", f"Choose one of {', '.join(PRECISIONS)}.")
    found = _place(runtime, device, files, engines)
    if found.runtime == "openvino":
        check_precision(precision)
        return replace(found, precision=precision, why=found.why if precision == "float32" else f"{found.why}, in {precision}")
    if precision != "float32":
        raise KdxError(f"The runtime {found.runtime} does not choose {precision}.", "Choose --runtime openvino, or leave --precision out.")
    return found


def _place(runtime: RuntimeName, device: str, files: bool, engines: bool) -> Choice:
    """The runtime and device, whatever the precision."""
    if runtime not in RUNTIMES:
        raise KdxError(f"There is no runtime {runtime!r}.", f"Choose one of {', '.join(RUNTIMES)}.")
    cuda = torch.cuda.is_available()
    gpus = ("cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))) if cuda else ()
    if device not in ("auto", "cpu", *gpus):
        raise KdxError(f"The device {device!r} cannot run here.", "Choose cpu, or see kdx doctor for what this machine can run.")
    why = "as asked" if runtime != "auto" else f"the networks are {'engines' if engines else 'ONNX files'}"
    if engines and runtime in ("eager", "onnx", "openvino"):
        raise KdxError(f"An .engine file cannot run in {runtime}.", "Choose --runtime tensorrt, or give the ONNX file.")
    if files and runtime == "eager":
        raise KdxError("An .onnx file cannot run in PyTorch.", "Choose --runtime onnx, or give the network itself.")
    if runtime == "tensorrt" or engines:
        check_gpu("cuda" if device == "auto" else device, "TensorRT")
        if not any(importlib.util.find_spec(package) for package in ("tensorrt", "tensorrt_rtx")):
            raise missing_package("tensorrt", "gpu", "The runtime tensorrt")
        chosen = torch.device("cuda" if device == "auto" else device)
        return Choice("tensorrt", chosen, f"tensorrt on {chosen}: {why}")
    has_onnx, has_openvino = (importlib.util.find_spec(package) is not None for package in ("onnxruntime", "openvino"))
    if runtime == "openvino":
        if device.startswith("cuda"):
            raise KdxError(f"OpenVINO runs on the CPU, not on {device}.", "Choose --device cpu, or another runtime.")
        if not has_openvino:
            raise missing_package("openvino", "openvino", "The runtime openvino")
        return Choice("openvino", CPU, f"openvino on the CPU: {why}")
    on_cpu = device == "cpu" or (device == "auto" and (files or not cuda))
    if runtime == "auto" and on_cpu and has_openvino and not has_onnx:
        return Choice("openvino", CPU, "openvino on the CPU: ONNX Runtime is not installed, and OpenVINO is")
    if runtime == "onnx" or files:
        if not has_onnx:
            raise missing_package("onnxruntime", "cpu", "The runtime onnx")
        if device.startswith("cuda"):
            if not has_cuda_provider():
                raise KdxError("The ONNX Runtime that is installed runs on the CPU only.", GPU_PACKAGE)
            return Choice("onnx", torch.device(device), f"onnx on {device}: {why}")
        return Choice("onnx", CPU, f"onnx on the CPU: {why}")
    if runtime == "eager":
        chosen = torch.device("cuda" if device == "auto" and cuda else "cpu" if device == "auto" else device)
        return Choice("eager", chosen, f"eager on {chosen}: as asked")
    if not on_cpu:
        return Choice("eager", torch.device("cuda" if device == "auto" else device), "eager on the GPU: PyTorch sees one")
    if has_onnx:
        return Choice("onnx", CPU, "onnx on the CPU: no GPU in use, and ONNX Runtime is faster there than PyTorch")
    return Choice("eager", CPU, "eager on the CPU: ONNX Runtime is not installed (pip install 'kdx[cpu]' makes it faster)")
