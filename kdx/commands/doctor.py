"""`kdx doctor`: probes what this machine can run. A probe that raises is reported and does not stop the others."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from kdx.commands.doctor_kernels import FailedStep, try_compiler, try_launcher
from kdx.errors import KdxError, first_line
from kdx.kernels import cubins, cuda
from kdx.kernels.compilers import COMPILERS
from kdx.runtimes.installed import cuda_provider_problem, gpu_problem
from kdx.runtimes.openvino import has_bfloat16


@dataclass(frozen=True)
class Finding:
    """The outcome of one probe. result: a version, a description or the error. hint: what to do if it does not work."""

    name: str
    works: bool
    result: str
    hint: str = ""


def probe() -> list[Finding]:
    """Every probe's finding, most important first."""
    return [_guarded(name, check, hint) for name, (check, hint) in _PROBES.items()]


def _guarded(name: str, check: Callable[[], str], hint: str) -> Finding:
    try:
        return Finding(name, True, check())
    except PackageNotFoundError:
        return Finding(name, False, "not installed", hint)
    except KdxError as error:
        return Finding(name, False, error.problem.rstrip("."), error.hint)
    except FailedStep as error:
        return Finding(name, False, first_line(error), error.hint)
    except Exception as error:  # a broken package may raise anything on import
        return Finding(name, False, first_line(error), hint)


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    if problem := gpu_problem():
        raise RuntimeError(f"PyTorch sees a GPU but cannot compute on it: {problem}")
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"


def _onnxruntime() -> str:
    import onnxruntime

    return f"{onnxruntime.__version__}, {', '.join(p.removesuffix('ExecutionProvider') for p in onnxruntime.get_available_providers())}"


def _cuda_provider() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    if problem := cuda_provider_problem():
        raise RuntimeError(problem)
    return "starts"


def _timm() -> str:
    import timm

    return str(timm.__version__)


def _torchvision() -> str:
    import torchvision

    return str(torchvision.__version__)


def _openvino() -> str:
    installed = version("openvino")
    return f"{installed}, float32 and bfloat16" if has_bfloat16() else f"{installed}, float32; this CPU has no bfloat16"


def _tensorrt() -> str:
    installed = version("tensorrt")
    importlib.import_module("tensorrt")  # loads its libraries, or names the missing one
    return installed


def _tensorrt_rtx() -> str:
    package = importlib.import_module("tensorrt_rtx")
    built = [f"sm_{name[2:]}" for name in package.ComputeCapability.__members__ if name.startswith("SM")]
    return f"{package.__version__}, builds engines for {', '.join(built)}"


def _cuda_bindings() -> str:
    installed = version("cuda-bindings")
    driver = importlib.import_module("cuda.bindings.driver")
    status, number = driver.cuDriverGetVersion()
    if int(status):
        raise RuntimeError("the NVIDIA driver does not answer")
    return f"{installed}, driver {number}, {try_launcher('cuda.bindings')}"


def _pycuda() -> str:
    installed = version("pycuda")
    driver = importlib.import_module("pycuda.driver")
    return f"{installed}, driver {driver.get_driver_version()}, is used in place of cuda-bindings: {try_launcher('pycuda')}"


def _cuda_kernels() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    cuda.launcher(torch.device("cuda"))  # compiles the kernels at the first call
    return f"run on {cubins.architecture(torch.cuda.get_device_capability())}, kept in {cubins.folder()}"


_GPU_EXTRA = "pip install 'kdx[gpu]' (in place of kdx[cpu])"

_COMPILER_HINT = "a CUDA build of PyTorch, which includes NVRTC, or the CUDA toolkit (nvcc on PATH); one of the two suffices"

_PROBES: dict[str, tuple[Callable[[], str], str]] = {
    "Python": (platform.python_version, ""),
    "runtime eager: PyTorch": (_torch, "pip install kdx"),
    "runtime onnx: ONNX Runtime": (_onnxruntime, "pip install 'kdx[cpu]'"),
    "runtime openvino: OpenVINO": (_openvino, "pip install 'kdx[openvino]'"),
    "GPU": (_gpu, "an NVIDIA driver, and the CUDA build of PyTorch for this GPU and driver (pytorch.org)"),
    "runtime onnx on the GPU": (_cuda_provider, _GPU_EXTRA),
    "runtime tensorrt: TensorRT": (_tensorrt, "pip install 'kdx[tensorrt]'"),
    "runtime tensorrt: TensorRT-RTX": (_tensorrt_rtx, "pip install 'kdx[tensorrt-rtx]'; it also builds engines on a machine without a GPU"),
    "cuda-bindings": (_cuda_bindings, _GPU_EXTRA),
    "PyCUDA": (_pycuda, "not needed where cuda-bindings is installed: pip install 'kdx[pycuda]' builds it with a CUDA toolkit"),
    **{f"CUDA compiler: {name}": (partial(try_compiler, name), _COMPILER_HINT) for name in COMPILERS},
    "CUDA kernels": (
        _cuda_kernels,
        f"a GPU, its driver, a CUDA compiler and cuda-bindings: {_GPU_EXTRA}; without them PyTorch computes the same",
    ),
    "models timm:": (_timm, "pip install 'kdx[models]'"),
    "models torchvision:": (_torchvision, "pip install 'kdx[models]', in the build that matches PyTorch"),
}
