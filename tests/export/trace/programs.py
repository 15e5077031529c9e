"""Trace a gradient graph, run its program, and compare the outputs with the eager graph's."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kdx.export import trace
from kdx.export.graphs import FeatureGraph, GradientGraph

TOLERANCE = 1e-5
"""Relative to an output's largest value: float32 sums in another order."""

BATCH = {0: Dim("batch")}


class Behind(nn.Module):
    """A layer and the operators behind it."""

    def __init__(self, rest: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, channels, 3, padding=1)
        self.rest = rest
        with torch.no_grad():
            outputs = rest.eval()(torch.rand(2, channels, 12, 10)) if isinstance(rest, nn.Module) else rest(torch.rand(2, channels, 12, 10))
        self.fc = nn.Linear(outputs.flatten(1).shape[1], 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.rest(self.layer(images)).flatten(1))
        return logits


def random_inputs(graph: GradientGraph, n: int, size: tuple[int, int] = (12, 10)) -> tuple[Tensor, Tensor]:
    images = torch.rand(n, 3, *size)
    with torch.no_grad():
        logits, raw = graph.watch(images)
        end = logits if graph.at is None else graph.as_map(raw[graph.at], graph.at, images)
    return images, torch.randn(end.shape)


def traced(graph: GradientGraph, size: tuple[int, int] = (12, 10)) -> ExportedProgram:
    """The graph's program; torch.export's warnings about its own deprecated calls are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace.traced_program(graph, random_inputs(graph, 5, size), (BATCH, BATCH))


def run(program: ExportedProgram, graph: FeatureGraph | GradientGraph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of the program in ONNX Runtime."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        file = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=list(graph.input_names), output_names=list(graph.output_names)
        )
    assert file is not None
    session = onnxruntime.InferenceSession(file.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in zip(graph.input_names, inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feeds)]


def agree(actual: Sequence[Tensor], graph: GradientGraph, inputs: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    expected = graph(*inputs)
    assert len(actual) == len(expected) == len(graph.output_names)
    for name, ours, theirs in zip(graph.output_names, actual, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
        off, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
        assert off <= tolerance * largest, f"{name}: {off} of {largest}"
    assert all(bool(gradient.any()) for gradient in expected[1 + len(graph.layers) :])


def in_pytorch(graph: GradientGraph, tolerance: float = TOLERANCE, size: tuple[int, int] = (12, 10)) -> ExportedProgram:
    """The program, after its outputs agreed with the eager graph's at another batch size."""
    program = traced(graph, size)
    inputs = random_inputs(graph, 3, size)
    agree(program.module()(*inputs), graph, inputs, tolerance)
    return program
