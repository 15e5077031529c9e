"""Compare an exported file with the PyTorch graph from which it was exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdx import threads
from kdx.errors import KdxError, missing_package
from kdx.export import half_precision
from kdx.export.copies import copied
from kdx.export.explainer_graphs import ExplainerGraph, Graph, ReferenceGraph
from kdx.export.graphs import GradientGraph
from kdx.kernels import ambient

TOLERANCE = 1e-4
"""The largest allowed error of an output, relative to its largest value. Reordered float32 sums in a deep network cause about 1e-6."""

COSINE = 0.9
"""The smallest allowed cosine between a file's output and PyTorch's, per image, where the two may differ.

A wrong graph has a cosine near 0, a rounded one above 0.99.
"""

_BATCHES = (6, 7)
_ATTEMPTS = 4
_CLASSES = 3


@dataclass(frozen=True)
class Difference:
    """How one output differs from PyTorch's.

    max, mean, q99: the largest error, the mean error and the 0.99 quantile of the errors, relative to ``largest``, which is the
    output's largest absolute value in PyTorch. cosine: the smallest cosine of an image's output with PyTorch's. For gradients,
    kinked: the number of images whose error exceeds the tolerance; smooth: the largest error of the other images.
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
    """The comparison of an exported file with PyTorch in float32, output by output; true if they agree.

    In a float32 file every error must be at most ``tolerance`` times the output's largest value. Gradients are an exception. If a
    ReLU's input differs from zero by no more than rounding, or two entries of a max-pool differ by no more than that, the derivative
    jumps: the file, PyTorch in float32 and PyTorch in float64 may each take either side. So at least one image of every batch must
    have a gradient within the tolerance of PyTorch's in float32 or in float64. The other images are counted, and need a cosine of at
    least 0.9. Scaling a map to [0, 1] divides its rounding error by its range as well, so errors of scaled maps are multiplied by the
    image's range relative to the largest value of all maps: an image with a weak map is not compared more strictly than in ``maps``.

    A file in half precision has no tolerance (None). Its logits, features and gradients need a cosine of at least 0.9 with PyTorch's
    in float32. The other outputs are made of differences of those and are only reported; they must be finite.
    """

    outputs: Mapping[str, Difference]
    tolerance: float | None
    batches: tuple[int, ...]
    reported: tuple[str, ...] = ()
    """Outputs that are reported and need no agreement."""

    def __bool__(self) -> bool:
        return not self.failures()

    def failures(self) -> tuple[str, ...]:
        """The names of the outputs that do not agree."""
        return tuple(name for name, difference in self.outputs.items() if not self._agrees(name, difference))

    def _agrees(self, name: str, difference: Difference) -> bool:
        if self.tolerance is None:
            return bool(np.isfinite(difference.max)) and (name in self.reported or difference.cosine >= COSINE)
        if difference.smooth is None:
            return difference.max <= self.tolerance
        return difference.smooth <= self.tolerance and (not difference.kinked or difference.cosine >= COSINE)

    def worst(self) -> str:
        """The largest disagreement as a phrase for an error message."""
        names = self.failures() or tuple(self.outputs)
        name = max(names, key=lambda name: np.nan_to_num(self.outputs[name].max, nan=np.inf))
        difference = self.outputs[name]
        if self.tolerance is None:
            return f"output {name} has a cosine of {difference.cosine:.3f} with float32's, and at least {COSINE} is needed"
        return f"output {name} differs by {difference.max:.1e} of its largest value, and at most {self.tolerance:.0e} is allowed"

    def summary(self) -> str:
        """One line for the command line."""
        differences = self.outputs.values()
        largest = max(difference.max if difference.smooth is None else difference.smooth for difference in differences)
        batches = " and ".join(map(str, self.batches))
        text = f"largest error {largest:.1e} of an output's largest value, on batches of {batches} images"
        kinked = max(difference.kinked for difference in differences)
        if kinked:
            text += f", except {kinked} images where a derivative jumps"
        if self.tolerance is None:
            text += f"; cosine with float32 at least {min(difference.cosine for difference in differences):.4f}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON stores it."""
        return asdict(self) | {"batches": list(self.batches), "reported": list(self.reported), "passed": bool(self)}


def seeded_inputs(graph: Graph, n: int, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Reproducible inputs of ``graph`` for n images of height and width ``size``.

    Images are patches of colour with a little noise, so that they differ from each other as photographs do.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator, dtype=torch.float32)
    noise = torch.rand(n, 3, *size, generator=generator, dtype=torch.float32)
    images = nn.functional.interpolate(coarse, size, mode="bilinear") * 0.8 + 0.2 * noise
    inputs = {"images": images}
    if isinstance(graph, ReferenceGraph):
        inputs["labels"] = graph.labels.cpu()[torch.arange(n) % len(graph.labels)]
    elif isinstance(graph, ExplainerGraph):
        inputs["target"] = nn.functional.one_hot(torch.arange(n) % _CLASSES, _CLASSES).float()
    if isinstance(graph, GradientGraph):
        inputs["cotangent"] = torch.randn(graph.cotangent_shape(images), generator=generator, dtype=torch.float32)
    return inputs


@ambient.neutral()
def compare(path: Path, graph: Graph, size: tuple[int, int], tolerance: float | None = TOLERANCE) -> ParityReport:
    """Compare the file at ``path``, run in ONNX Runtime, with ``graph``, run in PyTorch.

    Both run on the CPU, at two batch sizes, on seeded inputs with images of height and width ``size``. Number formats for which ONNX
    Runtime has no CPU arithmetic are simulated: each operator is computed in float32 and its result rounded, as GPUs do.

    Raises KdxError if the file does not run, or if its gradients do not change with its inputs.
    """
    session = _session(path)
    differences: dict[str, list[Difference]] = {name: [] for name in graph.output_names}
    previous: dict[str, NDArray[Any]] = {}
    for n in _BATCHES:
        for attempt in range(_ATTEMPTS):  # with other images, if a derivative jumps in every image
            inputs = seeded_inputs(graph, n, size, seed=n + 100 * attempt)
            outputs = dict(zip(graph.output_names, _run(session, inputs), strict=True))
            batch_differences = _differences(graph, inputs, outputs, tolerance)
            if all(difference.smooth is None or difference.kinked < n for difference in batch_differences.values()):
                break
        for name, output in outputs.items():
            differences[name].append(batch_differences[name])
            if name.startswith("gradient/") and name in previous and _same(output, previous[name]):
                raise KdxError(
                    f"The file's {name} does not change with its inputs.",
                    "Choose a layer that the prediction depends on; if it does, please report the network.",
                )
            previous[name] = output
    reported = tuple(name for name in graph.output_names if isinstance(graph, ExplainerGraph) and not name.startswith("logits/"))
    return ParityReport({name: _worst_of_batches(per_batch) for name, per_batch in differences.items()}, tolerance, _BATCHES, reported)


def _differences(
    graph: Graph, inputs: Mapping[str, Tensor], outputs: Mapping[str, NDArray[Any]], tolerance: float | None
) -> dict[str, Difference]:
    expected = _eager(graph, inputs)
    differences = {name: difference(output, expected[name]) for name, output in outputs.items()}
    for name in outputs:
        if isinstance(graph, ExplainerGraph) and name.endswith("/scaled"):
            ranges = _relative_ranges(expected[name.removesuffix("scaled") + "maps"])
            differences[name] = difference(outputs[name] * ranges, expected[name] * ranges)
    gradients = [name for name in outputs if name.startswith("gradient/") and tolerance is not None]
    exact: dict[str, NDArray[Any]] = {}
    if any(differences[name].max > (tolerance or 0) for name in gradients):
        exact = _eager(copied(graph).double(), {name: tensor.double() for name, tensor in inputs.items()})
    for name in gradients:
        errors = _errors(outputs[name], expected[name])
        if name in exact:
            errors = np.minimum(errors, _errors(outputs[name], exact[name]))
        agree = errors <= (tolerance or 0)
        smooth = float(errors[agree].max()) if agree.any() else float("inf")
        differences[name] = replace(differences[name], kinked=int((~agree).sum()), smooth=smooth)
    return differences


def _relative_ranges(maps: NDArray[Any]) -> NDArray[np.float64]:
    """The range of each image's map relative to the largest value of all, [n, 1, 1]; 1 where the range is zero."""
    values = maps.astype(np.float64)
    ranges = np.ptp(values, axis=(1, 2), keepdims=True)
    largest = np.abs(values).max()
    relative: NDArray[np.float64] = np.where(ranges > 0, ranges / (largest or 1), 1.0)
    return relative


def _errors(actual: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """The largest error of each image, relative to the largest value of all images."""
    if actual.shape != expected.shape:
        return np.full(len(actual), np.inf)
    errors = np.abs(actual - expected.astype(np.float64)).reshape(len(actual), -1).max(1) / (np.abs(expected).max() or 1)
    return np.where(np.isfinite(errors), errors, np.inf)


def difference(actual: NDArray[Any], expected: NDArray[Any]) -> Difference:
    """The errors of ``actual`` against ``expected``. They are infinite if the shapes differ, or if a value is NaN or infinite."""
    largest = float(np.abs(expected).max())
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return Difference(float("inf"), float("inf"), float("inf"), largest, float("nan"))
    wide = expected.astype(np.float64)
    errors = np.abs(actual - wide) / (largest or 1)
    return Difference(float(errors.max()), float(errors.mean()), float(np.quantile(errors, 0.99)), largest, _cosine(actual, wide))


def _cosine(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """The smallest cosine of an image; it is 1 where the two are equal, also where both are zero."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (actual, expected))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    agree = np.linalg.norm(a - b, axis=1) == 0
    return float(np.where(agree, 1.0, (a * b).sum(1) / np.where(norms > 0, norms, 1.0)).min())


def _same(output: NDArray[Any], previous: NDArray[Any]) -> bool:
    """Whether two outputs are equal in the images that both have."""
    n = min(len(output), len(previous))
    return np.array_equal(output[:n], previous[:n])


def _worst_of_batches(differences: Sequence[Difference]) -> Difference:
    """The worst value of each figure over the batches; the kinked images of all batches are added up."""
    smooth = [difference.smooth for difference in differences if difference.smooth is not None]
    return Difference(
        max=max(difference.max for difference in differences),
        mean=max(difference.mean for difference in differences),
        q99=max(difference.q99 for difference in differences),
        largest=max(difference.largest for difference in differences),
        cosine=min(difference.cosine for difference in differences),
        kinked=sum(difference.kinked for difference in differences),
        smooth=max(smooth) if smooth else None,
    )


def _run(session: Any, inputs: Mapping[str, Tensor]) -> list[NDArray[Any]]:
    try:
        outputs: list[NDArray[Any]] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    except Exception as error:  # ONNX Runtime's exceptions have no other common base; the trace may have fixed the batch size, for example
        cause = " ".join(str(error).split())
        raise KdxError(
            f"ONNX Runtime cannot run the exported file on {len(inputs['images'])} images: {cause}",
            "Until the network can be exported, run it with --runtime eager.",
        ) from error
    return outputs


def _eager(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """The outputs of the graph in PyTorch."""
    device = next(iter((*graph.parameters(), *graph.buffers()))).device
    outputs = graph(*(tensor.to(device) for tensor in inputs.values()))
    return {name: output.numpy(force=True) for name, output in zip(graph.output_names, outputs, strict=True)}


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "cpu", "Checking an exported file") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads.chosen() or threads.quota() or 0  # 0: one per core
    model = half_precision.simulated(path)
    if model is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # optimisation would merge the roundings
    try:
        return onnxruntime.InferenceSession(path if model is None else model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no other common base
        cause = " ".join(str(error).split())
        raise KdxError(
            f"ONNX Runtime cannot load the exported file: {cause}", "Until the network can be exported, run it with --runtime eager."
        ) from error
