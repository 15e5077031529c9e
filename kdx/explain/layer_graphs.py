"""The computation of a layer, captured as a CUDA graph where batches have the same shapes, if the user asks for it.

No GPU has run these graphs yet, so they are off unless `REQUEST` is 1 in the environment. For a small layer, the processor needs more time
for about fifty launches than the GPU needs for the work. A graph is a single launch. It reads from and writes to fixed memory: the features
of a batch are copied into this memory, and the results are copied out of it together. Therefore a batch does not overwrite the results of
earlier batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.explain.fused_layer import FusedMeasurement, measure_fused
from kdx.kernels import cuda
from kdx.runtimes.transfers import packed, replaced, tensors_of, unpacked

REQUEST = "KDX_CUDA_GRAPHS"
"""The environment variable that turns CUDA graphs on if it is 1."""

_BYTES = 1 << 29
"""The largest size of a graph's features in bytes. The kernels of larger layers take longer than their launches."""

_GRAPHS = 8
"""The largest number of graphs that are kept."""

Capture = Callable[[Callable[[], tuple[FusedMeasurement, Tensor]]], tuple[tuple[FusedMeasurement, Tensor], Callable[[], None]]]
"""Runs a computation once and returns its results, and a function that computes them again in the same memory."""


class CudaCapture:
    """`Capture` as CUDA graphs, which share the memory of their intermediate results."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], tuple[FusedMeasurement, Tensor]]) -> tuple[tuple[FusedMeasurement, Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy and allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = run()
        return results, graph.replay


@dataclass(frozen=True, eq=False)
class _Captured:
    """A captured computation: its inputs, its results, the same results ``packed`` as bytes, and a function that computes them again."""

    inputs: list[Tensor]
    results: FusedMeasurement
    packed: Tensor
    replay: Callable[[], None]

    def run(self, inputs: Sequence[Tensor]) -> FusedMeasurement:
        """The results for other inputs, in memory of their own."""
        for own, other in zip(self.inputs, inputs, strict=True):
            own.copy_(other)
        self.replay()
        return replaced(self.results, iter(unpacked(self.packed.clone(), list(tensors_of(self.results)))))


class LayerGraphs:
    """Captured computations by the shapes of their inputs. A computation is captured when its shapes occur for the second time.

    capture: None for CUDA graphs where the user asks for them and the launcher can be captured; otherwise nothing is captured.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture
        self._seen: set[object] = set()
        self._captured: dict[object, _Captured] = {}

    def measure(
        self,
        features: Mapping[str, Tensor],
        target: Tensor,
        labels: Tensor | None,
        objective: ObjectiveName,
        permutations: Tensor,
        *,
        shares: bool,
    ) -> FusedMeasurement:
        """`measure_fused`."""
        inputs = [permutations, target, *features.values()] + ([] if labels is None else [labels])
        key = (tuple(features), objective, shares, *((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs))
        if key in self._captured:
            return self._captured[key].run(inputs)
        if key not in self._seen or len(self._captured) == _GRAPHS or not self._can_capture(inputs):
            self._seen.add(key)
            return measure_fused(features, target, labels, objective, permutations, shares=shares)
        own = [torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor) for tensor in inputs]
        own_features = dict(zip(features, own[2:], strict=False))

        def run() -> tuple[FusedMeasurement, Tensor]:
            results = measure_fused(own_features, own[1], None if labels is None else own[-1], objective, own[0], shares=shares)
            return results, packed(list(tensors_of(results)))

        self._capture = self._capture or CudaCapture()
        (results, together), replay = self._capture(run)
        self._captured[key] = _Captured(own, results, together, replay)
        return self._captured[key].run(inputs)

    def close(self) -> None:
        """Free the memory of all graphs."""
        self._captured.clear()
        self._seen.clear()
        self._capture = None

    def _can_capture(self, inputs: Sequence[Tensor]) -> bool:
        small = sum(tensor.nbytes for tensor in inputs) <= _BYTES
        return small and (self._capture is not None or requested_on(inputs[0].device))


def requested_on(device: torch.device) -> bool:
    """Whether the user asks for CUDA graphs, and the device's launcher can be captured."""
    return os.environ.get(REQUEST) == "1" and cuda.launcher(device).can_be_captured
