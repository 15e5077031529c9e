"""The runtime onnx: ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdx import threads
from kdx.errors import KdxError, first_line, import_optional
from kdx.export.description import Shape, describe
from kdx.runtimes.cuda_stream import CPU, CudaStream, gpu_device
from kdx.runtimes.runner import FileRunner, input_dtype

Provider = Literal["cpu", "cuda"]

_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}

GPU_PACKAGE = "Install its GPU build in place of onnxruntime: pip uninstall onnxruntime, then pip install 'kdx[gpu]'"

_SHAPE_ARITHMETIC = (
    "Shape Size Gather Slice Concat Squeeze Unsqueeze Cast Add Sub Mul Div Mod Neg Abs Floor Ceil Round Min Max Equal Less "
    "LessOrEqual Greater GreaterOrEqual Not And Or Where Range ConstantOfShape Expand Reshape Identity Constant "
    "ReduceProd ReduceSum ReduceMin ReduceMax"
)
"""Operators that ONNX Runtime keeps on the CPU when they compute with sizes. All of them have CUDA kernels for features."""


class OnnxRuntimeRunner(FileRunner):
    """ONNX Runtime, with one of its execution providers: ``cpu`` or ``cuda``.

    Inputs and outputs are bound by address, so that nothing is copied to the host on a GPU. tf32: whether a GPU may round products
    to TensorFloat-32, which costs three digits.

    Raises KdxError if kdx did not write the file, and if the provider is not compiled in, does not start, or leaves part of the
    network to the CPU.
    """

    runtime = "onnx"

    def __init__(self, path: Path, provider: Provider = "cpu", device: torch.device | None = None, *, tf32: bool = False) -> None:
        onnxruntime = import_optional("onnxruntime", "cpu", "The runtime onnx")
        own_device = CPU if provider == "cpu" else gpu_device(device, f"ONNX Runtime's provider {provider}")
        if device is not None and device.type != own_device.type:
            raise ValueError(f"the provider {provider} does not run on {device}")
        self._set_file(path, describe(path), own_device)
        self._stream = None if provider == "cpu" else CudaStream(self.device)
        self._session: Any = _session(onnxruntime, path, provider, self._stream, tf32)
        self._options: Any = onnxruntime.RunOptions()
        if self._stream is not None:
            # The pass is queued on the runner's stream, for which PyTorch's stream waits. Otherwise the processor would wait.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs = _shapes(path, self._session.get_inputs())
        self.outputs = _shapes(path, self._session.get_outputs())
        symbols = {size for shape in self.inputs.values() for size in shape}
        for name, shape in self.outputs.items():
            for size in shape:
                if isinstance(size, str) and size not in symbols:
                    raise KdxError(
                        f"The output {name} of {path} has a dimension {size!r} that no input has.", "Export it again with kdx export."
                    )

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = self._session
        if session is None:
            raise ValueError("the runner is closed")
        inputs, sizes = self._prepared(feeds)
        outputs = self._empty_outputs(sizes)
        place = self.device.type, self.device.index or 0
        binding = session.io_binding()
        for name, tensor in inputs.items():
            kind = np.int64 if tensor.dtype == torch.int64 else np.float32
            binding.bind_input(name, *place, kind, tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            binding.bind_output(name, *place, np.float32, tuple(tensor.shape), tensor.data_ptr())
        try:
            with nullcontext() if self._stream is None else self._stream.taken():
                session.run_with_iobinding(binding, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise KdxError(
                f"ONNX Runtime cannot run {self._path}: {first_line(error)}.", "Try smaller batches, or --runtime eager."
            ) from error
        return outputs

    def close(self) -> None:
        self._session = None


def _session(onnxruntime: Any, path: Path, provider: Provider, stream: CudaStream | None, tf32: bool) -> Any:
    """A session whose provider runs the whole network, or a KdxError.

    ONNX Runtime has a switch for that, session.disable_cpu_ep_fallback. It also refuses the arithmetic on sizes that ONNX Runtime
    itself keeps on the CPU, so this function reads the provider of each node from the session instead.
    """
    name = _PROVIDERS[provider]
    options = onnxruntime.SessionOptions()
    # Otherwise its threads spin after a pass, and take cores from the other network, the geometry and the decoders.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # 0: as many as the process has cores, which includes neither a container's quota nor the number for each of several processes.
    options.intra_op_num_threads = threads.chosen() or threads.quota() or 0
    settings: dict[str, str] = {}
    if stream is not None:
        if name not in onnxruntime.get_available_providers():
            raise KdxError(f"The installed ONNX Runtime has no provider {provider}.", GPU_PACKAGE)
        if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
            raise KdxError(
                f"ONNX Runtime {onnxruntime.__version__} does not report which nodes run on the GPU.",
                "Upgrade it: pip install --upgrade onnxruntime-gpu",
            )
        onnxruntime.preload_dlls()  # CUDA's libraries come with PyTorch
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.log_severity_level = 3  # errors only: it warns about the arithmetic on sizes
        # For half precision it logs an error for each plan of cuDNN that does not exist, and uses another. Real errors are raised.
        onnxruntime.set_default_logger_severity(4)
        settings = {"device_id": str(stream.device.index), "user_compute_stream": str(stream.handle), "use_tf32": str(int(tf32))}
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(name, settings)])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise KdxError(f"ONNX Runtime cannot load {path}: {first_line(error)}.", "Export it again with kdx export.") from error
    session.disable_fallback()
    if session.get_providers()[0] != name:
        raise KdxError(
            f"ONNX Runtime's provider {provider} does not start here.",
            "Its log above names the missing library; kdx doctor lists what this machine can run.",
        )
    if stream is not None and (strays := _strays(session.get_provider_graph_assignment_info(), name)):
        raise KdxError(
            f"ONNX Runtime's provider {provider} does not run {strays[0]} of {path}.",
            "Choose --device cpu, or --runtime eager for the GPU.",
        )
    return session


def _strays(parts: Collection[Any], name: str) -> list[str]:
    """The nodes that another provider runs, except arithmetic on sizes."""
    return [
        f"the {node.op_type} node {node.name!r}"
        for part in parts
        if part.ep_name != name
        for node in part.get_nodes()
        if node.op_type not in _SHAPE_ARITHMETIC.split()
    ]


def _shapes(path: Path, values: Collection[Any]) -> dict[str, Shape]:
    try:
        for value in values:
            _ = value.name, value.type, value.shape
    except UnicodeDecodeError as error:
        raise KdxError(f"{path} contains a name that is not valid text.", "Export it again with kdx export.") from error
    for value in values:
        expected, name = ("tensor(int64)", "int64") if input_dtype(value.name) == torch.int64 else ("tensor(float)", "float32")
        if value.type != expected:
            raise KdxError(f"{value.name} of {path} is a {value.type}, not {name}.", "Export it again with kdx export.")
    return {value.name: tuple(value.shape) for value in values}
