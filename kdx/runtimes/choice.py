"""The choice of a runtime and a device, and the runner of an exported file."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from kdx.choices import PRECISIONS, RUNTIMES, Precision, RuntimeName
from kdx.errors import KdxError, missing_package
from kdx.export import engine
from kdx.export.description import Description, describe
from kdx.runtimes.cuda_stream import CPU, check_gpu
from kdx.runtimes.onnx_runtime import GPU_PACKAGE, OnnxRuntimeRunner, Provider, has_cuda_provider
from kdx.runtimes.openvino import OpenVinoRunner, check_precision
from kdx.runtimes.runner import FileRunner
from kdx.runtimes.tensorrt import TensorRtRunner


def is_file(network: object) -> bool:
    """Whether ``network`` is the path of an exported file, .onnx or .engine."""
    return isinstance(network, str | Path) and str(network).endswith((".onnx", ".engine"))


def describe_file(path: Path) -> Description:
    """The description inside an exported file, .onnx or .engine."""
    return engine.describe(path).file if path.suffix == ".engine" else describe(path)


@dataclass(frozen=True)
class Choice:
    """The runtime, device and precision to use, and the reason in one line."""

    runtime: str
    device: torch.device
    why: str
    precision: Precision = "float32"


def open_file(path: Path, choice: Choice) -> FileRunner:
    """The runner of an exported file: TensorRT's for .engine, and OpenVINO's or ONNX Runtime's for .onnx, as chosen."""
    if path.suffix == ".engine":
        return TensorRtRunner(path, choice.device)
    if path.suffix != ".onnx":
        raise KdxError(f"{path} is neither an .onnx nor an .engine file.", "Give a file that kdx export wrote.")
    if choice.runtime == "openvino":
        return OpenVinoRunner(path, precision=choice.precision)
    provider: Provider = "cpu" if choice.device.type == "cpu" else "cuda"
    return OnnxRuntimeRunner(path, provider, choice.device, tf32=choice.precision == "tf32")


def choose(
    runtime: RuntimeName, device: str = "auto", *, precision: Precision = "float32", files: bool = False, engines: bool = False
) -> Choice:
    """The runtime and device that execute the networks. ``auto`` is resolved; everything else is checked.

    files: the networks are exported files, which PyTorch cannot run. engines: they are .engine files, which only TensorRT can run.

    Raises KdxError for an unknown runtime, device or precision, and for one that cannot run here.
    """
    if precision not in PRECISIONS:
        raise KdxError(f"There is no precision {precision!r}.", f"Choose one of {', '.join(PRECISIONS)}.")
    if runtime not in RUNTIMES:
        raise KdxError(f"There is no runtime {runtime!r}.", f"Choose one of {', '.join(RUNTIMES)}.")
    if device not in ("auto", "cpu", *_gpus()):
        raise KdxError(f"The device {device!r} cannot run here.", "Choose cpu, or see kdx doctor for what this machine can run.")
    chosen, reason = _automatic(device, files, engines) if runtime == "auto" else (runtime, "as requested")
    if engines and chosen != "tensorrt":
        raise KdxError(f"An .engine file cannot run in {chosen}.", "Choose --runtime tensorrt, or give the ONNX file.")
    if files and chosen == "eager":
        raise KdxError("An .onnx file cannot run in PyTorch.", "Choose --runtime onnx, or give the network itself.")
    place = _device_for(chosen, device)
    if precision == "tf32" and (place == CPU or chosen not in ("eager", "onnx")):
        raise KdxError(
            f"The runtime {chosen} does not support tf32 on {place}.",
            "Choose --runtime eager or onnx on a GPU, or leave --precision out; an engine has the precision that it was built with.",
        )
    if precision == "bfloat16" and chosen != "openvino":
        raise KdxError(f"The runtime {chosen} does not support bfloat16.", "Choose --runtime openvino, or leave --precision out.")
    if chosen == "openvino":
        check_precision(precision)
    where = "the CPU" if place == CPU else str(place)
    return Choice(chosen, place, f"{chosen} on {where}: {reason}" + ("" if precision == "float32" else f", in {precision}"), precision)


def _automatic(device: str, files: bool, engines: bool) -> tuple[RuntimeName, str]:
    """The runtime for ``auto``, and the reason: PyTorch on a GPU; on the CPU the first that is installed of onnx, openvino and eager."""
    if engines:
        return "tensorrt", "the networks are engines"
    on_cpu = device == "cpu" or (device == "auto" and (files or not _gpus()))
    if on_cpu and _installed("openvino") and not _installed("onnxruntime"):
        return "openvino", "ONNX Runtime is not installed, and OpenVINO is"
    if files:
        return "onnx", "the networks are ONNX files"
    if not on_cpu:
        return "eager", "PyTorch sees a GPU"
    if _installed("onnxruntime"):
        return "onnx", "no GPU is in use, and ONNX Runtime is faster than PyTorch on a CPU"
    return "eager", "ONNX Runtime is not installed (pip install 'kdx[cpu]' makes it faster)"


def _device_for(runtime: RuntimeName, device: str) -> torch.device:
    """The device on which a runtime executes, or a KdxError if it is not installed or cannot use ``device``."""
    if runtime == "tensorrt":
        check_gpu("cuda" if device == "auto" else device, "TensorRT")
        if not (_installed("tensorrt") or _installed("tensorrt_rtx")):
            raise missing_package("tensorrt", "tensorrt", "The runtime tensorrt")
        return torch.device("cuda" if device == "auto" else device)
    if runtime == "openvino":
        if device.startswith("cuda"):
            raise KdxError(f"OpenVINO runs on the CPU, not on {device}.", "Choose --device cpu, or another runtime.")
        if not _installed("openvino"):
            raise missing_package("openvino", "openvino", "The runtime openvino")
        return CPU
    if runtime == "onnx":
        if not _installed("onnxruntime"):
            raise missing_package("onnxruntime", "cpu", "The runtime onnx")
        if device.startswith("cuda") and not has_cuda_provider():
            raise KdxError("The installed ONNX Runtime runs only on the CPU.", GPU_PACKAGE)
        if device == "auto":
            return torch.device("cuda") if _gpus() and has_cuda_provider() else CPU
        return torch.device(device)
    if device == "auto":
        return torch.device("cuda") if _gpus() else CPU
    return torch.device(device)


def _gpus() -> tuple[str, ...]:
    """The names of the GPUs that PyTorch sees; none on a machine without one."""
    if not torch.cuda.is_available():
        return ()
    return ("cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
