"""Compare an exported file with the PyTorch graph that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdx.errors import KdxError, missing_package
from kdx.export.graphs import FeatureGraph

TOLERANCE = 1e-4
"""Largest error of an output over its own largest value. Reordered float32 sums over a deep network stay near 1e-6."""


@dataclass(frozen=True)
class Difference:
    """Absolute errors of one output, relative to the output's largest absolute value."""

    max: float
    mean: float
    q99: float
    largest: float


@dataclass(frozen=True)
class ParityReport:
    """How an exported file compares with PyTorch, output by output; true where every error is within ``tolerance``."""

    outputs: Mapping[str, Difference]
    tolerance: float
    batch: int

    def __bool__(self) -> bool:
        return all(difference.max <= self.tolerance for difference in self.outputs.values())

    def worst(self) -> str:
        name, difference = max(self.outputs.items(), key=lambda item: np.nan_to_num(item[1].max, nan=np.inf))
        return f"output {name} differs by {difference.max:.1e} of its largest value, {self.tolerance:.0e} allowed"

    def summary(self) -> str:
        largest = max(difference.max for difference in self.outputs.values())
        return f"largest error {largest:.1e} of an output's largest value, on {self.batch} images it was not traced with"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": bool(self)}


def compare(path: Path, graph: FeatureGraph, images: torch.Tensor, tolerance: float = TOLERANCE) -> ParityReport:
    """Run the file at ``path`` in ONNX Runtime and ``graph`` in PyTorch on ``images`` [n, 3, h, w], on the CPU."""
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "cpu", "Checking an exported file") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        results = session.run(None, {"images": images.numpy()})
    except Exception as error:  # ONNX Runtime's exceptions share no other base; the tracer may have fixed the batch, say
        cause = " ".join(str(error).split())
        raise KdxError(
            f"ONNX Runtime cannot run the exported file on {len(images)} images: {cause}",
            "Until the network exports, run it with --runtime eager.",
        ) from error
    with torch.no_grad():
        expected = graph(images.to(graph.mean.device))
    differences = {
        name: difference(result, reference.numpy(force=True))
        for name, result, reference in zip(("logits", *graph.layers), results, expected, strict=True)
    }
    return ParityReport(differences, tolerance, len(images))


def difference(result: NDArray[Any], expected: NDArray[Any]) -> Difference:
    """The errors of ``result`` against ``expected``; another shape, NaN or infinity is an infinite error."""
    largest = float(np.abs(expected).max())
    if result.shape != expected.shape or not (np.isfinite(result).all() and np.isfinite(expected).all()):
        return Difference(float("inf"), float("inf"), float("inf"), largest)
    errors = np.abs(result.astype(np.float64) - expected) / (largest or 1)
    return Difference(float(errors.max()), float(errors.mean()), float(np.quantile(errors, 0.99)), largest)
