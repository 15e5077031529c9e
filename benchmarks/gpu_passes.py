"""The forward passes of two networks on one device: in PyTorch with three number formats, in ONNX Runtime and in TensorRT.

ONNX Runtime and TensorRT run a float16 file that kdx exports. Float32 is computed without TensorFloat-32, except in the row that names it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_clock import Clock
from benchmarks.kernel_cases import Sizes
from kdx import models
from kdx.errors import KdxError, first_line
from kdx.export import engine, onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.kernels.precision import tf32
from kdx.runtimes.choice import Choice, open_file
from kdx.runtimes.runner import Runner

BASELINES = ("passes, TensorRT float16", "passes, ONNX Runtime float16", "passes, float16")
"""The float16 passes; kdx is compared with the fastest of them."""


def time_passes(clock: Clock, network: str, layer: str, sizes: Sizes, seed: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Samples of two passes by name, and the reason for each that cannot run here."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(sizes.images, 3, *sizes.picture, generator=generator).to(clock.device)
    samples = {
        "passes, float32": _in_pytorch(clock, network, images, torch.float32),
        "passes, float16": _in_pytorch(clock, network, images, torch.float16),
    }
    with tf32():
        samples["passes, TF32"] = _in_pytorch(clock, network, images, torch.float32)
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        path = Path(name) / "network.onnx"
        parts: dict[str, Callable[[], Runner]] = {
            "passes, ONNX Runtime float16": lambda: open_file(path, Choice("onnx", clock.device, "")),
            "passes, TensorRT float16": lambda: open_file(_engine(path, sizes, clock.device), Choice("tensorrt", clock.device, "")),
        }
        try:
            _export(network, layer, sizes.picture, path)
        except KdxError as error:
            return samples, dict.fromkeys(parts, error.problem)
        for part, open_ in parts.items():
            try:
                runners = [stack.enter_context(open_()) for _ in range(2)]
                samples[part] = clock.seconds(lambda runners=runners: [runner.infer(images) for runner in runners])  # type: ignore[misc]
            except Exception as error:  # a runtime may raise any exception, and the other figures are valid without it
                reasons[part] = first_line(error)
    return samples, reasons


def _in_pytorch(clock: Clock, network: str, images: Tensor, dtype: torch.dtype) -> list[float]:
    """In channels-last."""
    modules = [models.load(network).module.eval().to(clock.device, dtype) for _ in range(2)]
    for module in modules:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = images.to(dtype, memory_format=torch.channels_last)

    def passes() -> None:
        with torch.no_grad():
            for module in modules:
                module(pixels)

    return clock.seconds(passes)


def _export(network: str, layer: str, size: tuple[int, int], path: Path) -> None:
    graph = FeatureGraph(models.load(network).module.eval(), [layer], Preprocessing())
    onnx_file.write(graph, path, origin=Origin(network, ""), image_size=size, precision="fp16")


def _engine(path: Path, sizes: Sizes, device: torch.device) -> Path:
    if device.type != "cuda":
        raise KdxError("TensorRT needs a GPU.", "Run the benchmark on one.")
    built = path.with_suffix(".engine")
    if not built.exists():
        engine.build(path, built, batch=(sizes.images,) * 3)
    return built
