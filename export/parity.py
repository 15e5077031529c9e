"""Compare an exported file with the PyTorch graph that it came from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdx.errors import KdxError, missing_package
from kdx.export import half_precision
from kdx.export.graphs import ExplainerGraph, GradientGraph, Graph

TOLERANCE = 1e-4
"""Largest error of an output over its own largest value. Reordered float32 sums over a deep network stay near 1e-6."""

COSINE = 0.9
"""Least cosine of an image's output with PyTorch's where the two may differ: a wrong graph is near 0, a rounded one above 0.99."""

_BATCHES = (6, 7)
_ATTEMPTS = 4
_CLASSES = 3


@dataclass(frozen=True)
class Difference:
    """Absolute errors of one output relative to the output's largest absolute value, and the images' least cosine with PyTorch's.

    kinked: of a gradient, the images whose error is past the tolerance; smooth: the largest error of the others.
    """

    max: float
    mean: float
    q99: float
    largest: float
    cosine: float
    kinked: int = 0
    smooth: float | None = None


@dataclass(frozen=True)
class ParityReport:
    """How an exported file compares with PyTorch in float32, output by output; true where it agrees.

    In float32 every error is within ``tolerance`` of the output's largest value. Gradients have an exception: where a ReLU's input
    is no more than rounding away from zero, or two entries of a max-pool from each other, the derivative jumps, and files, PyTorch
    in float32 and in float64 each take one side. So of gradients at least one image of every batch must be within the tolerance
    of PyTorch in float32 or in float64, and the others, which are counted, at a cosine of 0.9 at least.

    A file in half precision has no tolerance (None): its logits, features and gradients have a cosine of at least 0.9 with
    PyTorch's in float32, and the rest, which is made of differences of those, is reported.
    """

    outputs: Mapping[str, Difference]
    tolerance: float | None
    batches: tuple[int, ...]
    reported: tuple[str, ...] = ()
    """Outputs that are not judged."""

    def __bool__(self) -> bool:
        return not self.failures()

    def failures(self) -> tuple[str, ...]:
        return tuple(name for name, found in self.outputs.items() if not self._agrees(name, found))

    def _agrees(self, name: str, found: Difference) -> bool:
        if self.tolerance is None:
            return bool(np.isfinite(found.max)) and (name in self.reported or found.cosine >= COSINE)
        if found.smooth is None:
            return found.max <= self.tolerance
        return found.smooth <= self.tolerance and (not found.kinked or found.cosine >= COSINE)

    def worst(self) -> str:
        """What to say of a file that fails."""
        names = self.failures() or tuple(self.outputs)
        name = max(names, key=lambda name: np.nan_to_num(self.outputs[name].max, nan=np.inf))
        found = self.outputs[name]
        if self.tolerance is None:
            return f"output {name} has a cosine of {found.cosine:.3f} with float32's, {COSINE} at least"
        return f"output {name} differs by {found.max:.1e} of its largest value, {self.tolerance:.0e} allowed"

    def summary(self) -> str:
        largest = max(found.max if found.smooth is None else found.smooth for found in self.outputs.values())
        said = f"largest error {largest:.1e} of an output's largest value, on batches of {' and '.join(map(str, self.batches))} images"
        kinked = max(found.kinked for found in self.outputs.values())
        if kinked:
            said += f", {kinked} images beside, where a derivative jumps"
        if self.tolerance is None:
            said += f"; cosine with float32 at least {min(found.cosine for found in self.outputs.values()):.4f}"
        return said

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"batches": list(self.batches), "reported": list(self.reported), "passed": bool(self)}


def inputs(graph: Graph, n: int, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Seeded inputs of ``graph``, for n images of a size: patches of colour under a little noise, unlike each other as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    images = nn.functional.interpolate(coarse, size, mode="bilinear") * 0.8 + 0.2 * torch.rand(n, 3, *size, generator=generator)
    given = {"images": images}
    if isinstance(graph, ExplainerGraph):
        given["target"] = nn.functional.one_hot(torch.arange(n) % _CLASSES, _CLASSES).float()
    if isinstance(graph, GradientGraph):
        given["cotangent"] = torch.randn(graph.cotangent_shape(images), generator=generator)
    return given


def compare(path: Path, graph: Graph, size: tuple[int, int], tolerance: float | None = TOLERANCE) -> ParityReport:
    """Run the file at ``path`` in ONNX Runtime and ``graph`` in PyTorch, on the CPU, at two batch sizes, on seeded inputs of a size.

    Types that ONNX Runtime has no arithmetic for on the CPU are computed in float32 and rounded after every operator, which is
    how GPUs compute in them. Raises KdxError where the file does not run, and where its gradients do not change with its inputs.
    """
    session = _session(path)
    found: dict[str, list[Difference]] = {name: [] for name in graph.output_names}
    earlier: dict[str, NDArray[Any]] = {}
    for n in _BATCHES:
        for attempt in range(_ATTEMPTS):  # other images where a derivative jumps in every one
            feeds = inputs(graph, n, size, seed=n + 100 * attempt)
            named = dict(zip(graph.output_names, _run(session, feeds), strict=True))
            differences = _differences(graph, feeds, named, tolerance)
            if all(each.smooth is None or each.kinked < n for each in differences.values()):
                break
        for name, result in named.items():
            found[name].append(differences[name])
            if name.startswith("gradient/") and name in earlier and _same(result, earlier[name]):
                raise KdxError(
                    f"The file's {name} does not change with its inputs.",
                    "Choose a layer that the prediction depends on; if it does, please report the network.",
                )
            earlier[name] = result
    reported = tuple(name for name in graph.output_names if isinstance(graph, ExplainerGraph) and not name.startswith("logits/"))
    return ParityReport({name: _worse(each) for name, each in found.items()}, tolerance, _BATCHES, reported)


def _differences(
    graph: Graph, feeds: Mapping[str, Tensor], named: Mapping[str, NDArray[Any]], tolerance: float | None
) -> dict[str, Difference]:
    expected = _eager(graph, feeds)
    found = {name: difference(result, expected[name]) for name, result in named.items()}
    jumping = [name for name in named if name.startswith("gradient/") and tolerance is not None]
    exact: dict[str, NDArray[Any]] = {}
    if any(found[name].max > (tolerance or 0) for name in jumping):
        exact = _eager(copy.deepcopy(graph).double(), {name: tensor.double() for name, tensor in feeds.items()})
    for name in jumping:
        errors = _errors(named[name], expected[name])
        if name in exact:
            errors = np.minimum(errors, _errors(named[name], exact[name]))
        agree = errors <= (tolerance or 0)
        smooth = float(errors[agree].max()) if agree.any() else float("inf")
        found[name] = replace(found[name], kinked=int((~agree).sum()), smooth=smooth)
    return found


def _errors(result: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Each image's largest error over the largest value of all."""
    if result.shape != expected.shape:
        return np.full(len(result), np.inf)
    errors = np.abs(result - expected.astype(np.float64)).reshape(len(result), -1).max(1) / (np.abs(expected).max() or 1)
    return np.where(np.isfinite(errors), errors, np.inf)


def difference(result: NDArray[Any], expected: NDArray[Any]) -> Difference:
    """The errors of ``result`` against ``expected``; another shape, NaN or infinity is an infinite error."""
    largest = float(np.abs(expected).max())
    if result.shape != expected.shape or not (np.isfinite(result).all() and np.isfinite(expected).all()):
        return Difference(float("inf"), float("inf"), float("inf"), largest, float("nan"))
    wide = expected.astype(np.float64)
    errors = np.abs(result - wide) / (largest or 1)
    return Difference(float(errors.max()), float(errors.mean()), float(np.quantile(errors, 0.99)), largest, _cosine(result, wide))


def _cosine(result: NDArray[Any], expected: NDArray[Any]) -> float:
    """The least of the images' cosines; two zeros agree."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (result, expected))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    agree = np.linalg.norm(a - b, axis=1) == 0
    return float(np.where(agree, 1.0, (a * b).sum(1) / np.where(norms > 0, norms, 1.0)).min())


def _same(result: NDArray[Any], earlier: NDArray[Any]) -> bool:
    n = min(len(result), len(earlier))
    return np.array_equal(result[:n], earlier[:n])


def _worse(found: Sequence[Difference]) -> Difference:
    """The worst of each figure over batches; images counted together."""
    smooth = [each.smooth for each in found if each.smooth is not None]
    return Difference(
        max=max(each.max for each in found),
        mean=max(each.mean for each in found),
        q99=max(each.q99 for each in found),
        largest=max(each.largest for each in found),
        cosine=min(each.cosine for each in found),
        kinked=sum(each.kinked for each in found),
        smooth=max(smooth) if smooth else None,
    )


def _run(session: Any, feeds: Mapping[str, Tensor]) -> list[NDArray[Any]]:
    try:
        results: list[NDArray[Any]] = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    except Exception as error:  # ONNX Runtime's exceptions share no other base; the tracer may have fixed the batch, say
        cause = " ".join(str(error).split())
        raise KdxError(
            f"ONNX Runtime cannot run the exported file on {len(feeds['images'])} images: {cause}",
            "Until the network exports, run it with --runtime eager.",
        ) from error
    return results


def _eager(graph: Graph, feeds: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    device = next(iter((*graph.parameters(), *graph.buffers()))).device
    with torch.no_grad():
        results = graph(*(tensor.to(device) for tensor in feeds.values()))
    return {name: result.numpy(force=True) for name, result in zip(graph.output_names, results, strict=True)}


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "cpu", "Checking an exported file") from None
    options = onnxruntime.SessionOptions()
    model = half_precision.simulated(path)
    if model is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would join the roundings
    try:
        return onnxruntime.InferenceSession(path if model is None else model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        cause = " ".join(str(error).split())
        raise KdxError(
            f"ONNX Runtime cannot load the exported file: {cause}", "Until the network exports, run it with --runtime eager."
        ) from error
