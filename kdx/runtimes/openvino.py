"""The runtime openvino: OpenVINO on the CPU, in float32, or in bfloat16 on a CPU that supports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdx.choices import Precision
from kdx.errors import KdxError, missing_package
from kdx.export.description import Shape, describe
from kdx.runtimes.cuda_stream import CPU
from kdx.runtimes.runner import FileRunner, input_dtype

_HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}

_SOURCE_LINES = ("Exception from ", "Check '", "FrontEnd API failed with ")
"""The beginnings of those lines of OpenVINO's messages that refer to its source code."""


class OpenVinoRunner(FileRunner):
    """OpenVINO on the CPU, with one thread per core, like ONNX Runtime.

    precision: ``bfloat16`` keeps 8 bits of every number inside the networks, and sums products in float32. By default OpenVINO
    would choose it on every CPU that supports it, so ``float32`` is requested explicitly.

    Raises KdxError if the package is missing, kdx did not write the file, or OpenVINO cannot load it. bfloat16 also raises on a
    CPU that does not support it, and for an explainer file, whose geometry stays float32.
    """

    runtime = "openvino"

    def __init__(self, path: Path, *, precision: Precision = "float32") -> None:
        core = _core()
        check_precision(precision)
        self.precision = precision
        self._set_file(path, describe(path), CPU)
        self.inputs, self.outputs = self.description.inputs, self.description.outputs
        if self.kind == "explainer" and precision != "float32":
            raise rounds_geometry(path)
        try:
            self._model: Any = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": _HINTS[precision]})
        except RuntimeError as error:
            raise KdxError(f"OpenVINO cannot load {path}: {_message(error)}.", "Choose --runtime onnx, or export it again.") from error
        _check_ports(path, self._model.inputs, self.inputs)
        _check_ports(path, self._model.outputs, self.outputs)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = self._model
        if model is None:
            raise ValueError("the runner is closed")
        inputs, sizes = self._prepared(feeds)
        outputs = self._empty_outputs(sizes)
        shared_inputs, shared_outputs = ([_shared(tensor) for tensor in tensors.values()] for tensors in (inputs, outputs))
        # One request per pass: it costs microseconds, and the next pass, or another thread, writes to other memory.
        request = model.create_infer_request()
        try:
            # By position: layers that are the same tensor may have each other's names.
            for position, tensor in enumerate(shared_inputs):
                request.set_input_tensor(position, tensor)
            for position, tensor in enumerate(shared_outputs):
                request.set_output_tensor(position, tensor)
            request.infer()
        except RuntimeError as error:
            raise KdxError(f"OpenVINO cannot run {self._path}: {_message(error)}.", "Try smaller batches, or --runtime onnx.") from error
        return outputs

    def close(self) -> None:
        self._model = None


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU. Raises KdxError if OpenVINO is not installed."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def check_precision(precision: Precision) -> None:
    """KdxError if this CPU does not support the precision."""
    if precision == "bfloat16" and not has_bfloat16():
        raise KdxError("This CPU does not compute in bfloat16.", "Choose --precision float32; kdx doctor lists what this machine can run.")


def rounds_geometry(path: Path) -> KdxError:
    """The error for an explainer file in bfloat16."""
    return KdxError(
        f"{path} contains geometry beside the networks, which bfloat16 would round too.",
        "Choose --precision float32, or give the networks themselves, whose geometry stays float32.",
    )


def _core() -> Any:
    try:
        import openvino
    except ImportError:
        raise missing_package("openvino", "openvino", "The runtime openvino") from None
    return openvino.Core()


def _shared(tensor: Tensor) -> Any:
    """An OpenVINO tensor on the same memory."""
    import openvino

    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _check_ports(path: Path, ports: Sequence[Any], shapes: Mapping[str, Shape]) -> None:
    """KdxError if the graph's inputs or outputs differ from the file's description, in name, order or shape: passes rely on the shapes."""
    import openvino

    described = {name: openvino.PartialShape([-1 if isinstance(size, str) else size for size in shape]) for name, shape in shapes.items()}
    fits = len(ports) == len(described) and all(
        name in port.get_names()
        and port.get_element_type() == (openvino.Type.i64 if input_dtype(name) == torch.int64 else openvino.Type.f32)
        and port.get_partial_shape().compatible(shape)
        for port, (name, shape) in zip(ports, described.items(), strict=True)
    )
    if not fits:
        raise KdxError(
            f"The graph in {path} does not have the {', '.join(described)} of its description.", "Export it again with kdx export."
        )


def _message(error: RuntimeError) -> str:
    """The first line of OpenVINO's message that does not refer to its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(_SOURCE_LINES)), type(error).__name__).rstrip(".")
