"""OpenVINO: the same ONNX files on the CPU, in float32, or in bfloat16 where the CPU multiplies that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdx.choices import Precision
from kdx.errors import KdxError, missing_package
from kdx.export.description import Shape, describe
from kdx.runtimes.runner import FileRunner

_HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}

_SCAFFOLDING = ("Exception from ", "Check '", "FrontEnd API failed with ")
"""How lines of OpenVINO's messages begin that speak of its own source."""


class OpenVinoRunner(FileRunner):
    """OpenVINO on the CPU, with a thread a core, as ONNX Runtime has.

    precision: ``bfloat16`` keeps 8 bits of every number inside the networks, and sums products in float32. OpenVINO would choose
    it by itself wherever the CPU has it, so ``float32`` is asked for by name.

    Raises KdxError where the package is missing, the file is none of kdx's or OpenVINO cannot load it, and for bfloat16 where
    the CPU has none or the file is an explainer, whose geometry stays float32.
    """

    runtime = "openvino"

    def __init__(self, path: Path, *, precision: Precision = "float32") -> None:
        core = _core()
        check_precision(precision)
        self.device = torch.device("cpu")
        self.precision = precision
        self.description = describe(path)
        self.kind = self.description.kind
        self.layers = self.description.layers
        self.inputs, self.outputs = self.description.inputs, self.description.outputs
        if self.kind == "explainer" and precision != "float32":
            raise rounds_geometry(path)
        self._path = path
        try:
            self._model: Any = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": _HINTS[precision]})
        except RuntimeError as error:
            raise KdxError(f"OpenVINO cannot load {path}: {_said(error)}.", "Choose --runtime onnx, or export it again.") from error
        _check_ports(path, self._model.inputs, self.inputs)
        _check_ports(path, self._model.outputs, self.outputs)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = self._model
        if model is None:
            raise ValueError("the runner is closed")
        inputs, sizes = self._fed(feeds)
        outputs = self._empty(sizes)
        read, written = ([_shared(tensor) for tensor in tensors.values()] for tensors in (inputs, outputs))
        # A request a pass: it costs microseconds, and the next pass, or another thread's, writes to other memory.
        request = model.create_infer_request()
        try:
            # By place: layers that are one tensor may have each other's names.
            for place, tensor in enumerate(read):
                request.set_input_tensor(place, tensor)
            for place, tensor in enumerate(written):
                request.set_output_tensor(place, tensor)
            request.infer()
        except RuntimeError as error:
            raise KdxError(f"OpenVINO cannot run {self._path}: {_said(error)}.", "Try smaller batches, or --runtime onnx.") from error
        return outputs

    def close(self) -> None:
        self._model = None


def has_bfloat16() -> bool:
    """Whether the CPU here multiplies bfloat16, as far as OpenVINO uses it. KdxError where OpenVINO is not installed."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def check_precision(precision: Precision) -> None:
    """KdxError where the CPU here cannot compute in it."""
    if precision == "bfloat16" and not has_bfloat16():
        raise KdxError("This CPU does not compute in bfloat16.", "Choose --precision float32; kdx doctor says what this machine can run.")


def rounds_geometry(path: Path) -> KdxError:
    """The error of an explainer file in bfloat16."""
    return KdxError(
        f"{path} holds geometry beside the networks, which bfloat16 would round too.",
        "Choose --precision float32, or give the networks themselves, whose geometry stays float32.",
    )


def _core() -> Any:
    try:
        import openvino
    except ImportError:
        raise missing_package("openvino", "openvino", "The runtime openvino") from None
    return openvino.Core()


def _shared(tensor: Tensor) -> Any:
    """The tensor's own memory as OpenVINO takes it."""
    import openvino

    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _check_ports(path: Path, ports: Sequence[Any], shapes: Mapping[str, Shape]) -> None:
    """KdxError where the graph's inputs or outputs are not those, in order, that the file tells of: passes write by these shapes."""
    import openvino

    told = {name: openvino.PartialShape([-1 if isinstance(size, str) else size for size in shape]) for name, shape in shapes.items()}
    fits = len(ports) == len(told) and all(
        name in port.get_names() and port.get_element_type() == openvino.Type.f32 and port.get_partial_shape().compatible(shape)
        for port, (name, shape) in zip(ports, told.items(), strict=True)
    )
    if not fits:
        raise KdxError(f"{path} does not hold the {', '.join(told)} that it tells of.", "Export it again with kdx export.")


def _said(error: RuntimeError) -> str:
    """The first line of OpenVINO's message that does not speak of its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(_SCAFFOLDING)), type(error).__name__).rstrip(".")
