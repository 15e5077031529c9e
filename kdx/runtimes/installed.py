"""Checks of what is installed and works. They turn any error of a broken installation into a reason, so that ``auto`` can choose another
runtime or device.

Each check returns an empty string if everything works, and runs once per process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch

from kdx.errors import first_line


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # its parent is not installed, or its module has no description
        return False


@functools.cache
def package_problem(package: str) -> str:
    """The reason why an installed package cannot be imported, or ""."""
    try:
        importlib.import_module(package)
    except Exception as error:  # ImportError, OSError for a library, AttributeError for another version, and more
        return first_line(error)
    return ""


@functools.cache
def gpu_problem() -> str:
    """The reason why PyTorch cannot compute on the GPU that it sees, or "": its build may lack the GPU's architecture, or the driver may be
    too old."""
    try:
        torch.ones(2, device="cuda").sum().item()
    except Exception as error:  # PyTorch raises RuntimeError and AssertionError
        return first_line(error)
    return ""


@functools.cache
def cuda_provider_problem() -> str:
    """The reason why ONNX Runtime's CUDA provider does not work, or "". A provider that is compiled in may still lack a library."""
    name = "CUDAExecutionProvider"
    try:
        import onnxruntime

        if name not in onnxruntime.get_available_providers():
            return "the ONNX Runtime here is built for the CPU only"
        onnxruntime.preload_dlls()  # CUDA's libraries come with PyTorch
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # the reason is returned
        session = onnxruntime.InferenceSession(_one_node(), options, providers=[name])
        if session.get_providers()[0] != name:
            return "its CUDA provider does not start, since a library of CUDA or cuDNN is missing"
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        return first_line(error)
    return ""


def _one_node() -> bytes:
    """The smallest network: y = relu(x)."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", [x], [y])
    network: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    return network
