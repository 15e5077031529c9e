"""The choice of a runtime and a device, and the runner of an exported file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from kdx.choices import PRECISIONS, RUNTIMES, Precision, RuntimeName
from kdx.errors import KdxError, missing_package
from kdx.export import engine
from kdx.export.description import Description, describe
from kdx.runtimes.cuda_stream import CPU, check_gpu
from kdx.runtimes.installed import cuda_provider_problem, gpu_problem, is_installed, package_problem
from kdx.runtimes.onnx_runtime import GPU_PACKAGE, OnnxRuntimeRunner, Provider
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


def allows_tf32(choice: Choice, files: Iterable[str | Path | None]) -> bool:
    """Whether a choice lets a GPU round the products of the networks to TensorFloat-32. An engine file has the setting that it was built
    with. files: the files of the networks; those that are not engines do not matter."""
    engines = [Path(file) for file in files if file is not None and str(file).endswith(".engine")]
    return choice.precision == "tf32" or any(engine.describe(path).tf32 for path in engines)


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
    if device.startswith("cuda") and (problem := gpu_problem()):
        raise KdxError(
            f"PyTorch sees a GPU but cannot compute on it: {problem}.",
            "Choose --device cpu, or install the build of PyTorch for this GPU and driver.",
        )
    chosen, reason = _automatic(device, files, engines) if runtime == "auto" else (runtime, "as requested")
    if engines and chosen != "tensorrt":
        raise KdxError(f"An .engine file cannot run in {chosen}.", "Choose --runtime tensorrt, or give the ONNX file.")
    if files and chosen == "eager":
        raise KdxError("An .onnx file cannot run in PyTorch.", "Choose --runtime onnx, or give the network itself.")
    place, note = _device_for(chosen, device)
    if precision == "tf32" and (place == CPU or chosen == "openvino" or engines):
        raise KdxError(
            f"The runtime {chosen} does not support tf32 on {place}.",
            "Choose --runtime eager, onnx or tensorrt on a GPU, or leave --precision out; an engine file has its own precision.",
        )
    if precision == "bfloat16" and chosen != "openvino":
        raise KdxError(f"The runtime {chosen} does not support bfloat16.", "Choose --runtime openvino, or leave --precision out.")
    if chosen == "openvino":
        check_precision(precision)
    where = "the CPU" if place == CPU else str(place)
    parts = (f"{chosen} on {where}: {reason}", note, "" if precision == "float32" else f"in {precision}")
    return Choice(chosen, place, ", ".join(filter(None, parts)), precision)


def _automatic(device: str, files: bool, engines: bool) -> tuple[RuntimeName, str]:
    """The runtime for ``auto``, and the reason: PyTorch on a GPU, else the first of onnx, openvino and eager that works on the CPU.

    Errors of a broken installation are not raised; they become a part of the reason.
    """
    if engines:
        return "tensorrt", "the networks are engines"
    if not files and device != "cpu" and (device != "auto" or _usable_gpu()):
        return "eager", "PyTorch sees a GPU"
    without_onnx = _obstacle("onnxruntime", "ONNX Runtime")
    if without_onnx and not device.startswith("cuda") and is_installed("openvino") and not package_problem("openvino"):
        return "openvino", f"{without_onnx}, and OpenVINO {'is' if without_onnx.endswith('installed') else 'does'}"
    if files:
        return "onnx", "the networks are ONNX files"
    if not without_onnx:
        return "onnx", "no GPU is in use, and ONNX Runtime is faster than PyTorch on a CPU"
    return "eager", f"{without_onnx} (pip install 'kdx[cpu]' makes it faster)"


def _obstacle(package: str, name: str) -> str:
    """Why a package cannot be used; empty if it can."""
    if not is_installed(package):
        return f"{name} is not installed"
    problem = package_problem(package)
    return f"{name} does not load ({problem})" if problem else ""


def _device_for(runtime: RuntimeName, device: str) -> tuple[torch.device, str]:
    """The device on which a runtime executes, and a note if ``auto`` does not use the GPU that PyTorch sees.

    Raises KdxError if the runtime is not installed, does not load, or cannot use ``device``.
    """
    if runtime == "tensorrt":
        check_gpu("cuda" if device == "auto" else device, "TensorRT")
        if not (is_installed("tensorrt") or is_installed("tensorrt_rtx")):
            raise missing_package("tensorrt", "tensorrt", "The runtime tensorrt")
        return torch.device("cuda" if device == "auto" else device), ""
    if runtime == "openvino":
        if device.startswith("cuda"):
            raise KdxError(f"OpenVINO runs on the CPU, not on {device}.", "Choose --device cpu, or another runtime.")
        _check_loads("openvino", "openvino", runtime)
        return CPU, ""
    if runtime == "onnx":
        _check_loads("onnxruntime", "cpu", runtime)
        if device.startswith("cuda") and (problem := cuda_provider_problem()):
            raise KdxError(f"ONNX Runtime cannot use the GPU: {problem}.", GPU_PACKAGE)
        if device != "auto":
            return torch.device(device), ""
        return _gpu_or_cpu(gpu_problem() or cuda_provider_problem() if _gpus() else "")
    return _gpu_or_cpu(gpu_problem() if _gpus() else "") if device == "auto" else (torch.device(device), "")


def _gpu_or_cpu(problem: str) -> tuple[torch.device, str]:
    """The GPU if there is one and no ``problem``; else the CPU, and a note about the problem."""
    if problem:
        return CPU, f"and not on the GPU ({problem})"
    return torch.device("cuda") if _gpus() else CPU, ""


def _check_loads(package: str, extra: str, runtime: str) -> None:
    if not is_installed(package):
        raise missing_package(package, extra, f"The runtime {runtime}")
    if problem := package_problem(package):
        raise KdxError(
            f"The runtime {runtime} needs the package {package}, whose import fails: {problem}.",
            f"Install it again: pip install --force-reinstall 'kdx[{extra}]'",
        )


def _usable_gpu() -> bool:
    return bool(_gpus()) and not gpu_problem()


def _gpus() -> tuple[str, ...]:
    """The names of the GPUs that PyTorch sees; empty on a machine without one, or if PyTorch cannot list them."""
    try:
        if not torch.cuda.is_available():
            return ()
        return ("cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
    except Exception:  # a driver that does not match the libraries
        return ()
