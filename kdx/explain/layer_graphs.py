"""The computation of a layer, captured as a CUDA graph where batches have the same shapes.

For a small layer, the processor needs more time for about fifty launches than the GPU needs for the work. A graph is a single launch. It
reads from and writes to fixed memory: the features of a batch are copied into this memory, and the results are copied out of it together.
Therefore a batch does not overwrite the results of earlier batches. `SWITCH` turns the graphs off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.explain.fused_layer import FusedMeasurement, measure_fused
from kdx.kernels import cuda
from kdx.kernels.drivers import DriverError
from kdx.runtimes.transfers import packed, replaced, tensors_of, unpacked

SWITCH = "KDX_CUDA_GRAPHS"
"""The environment variable that turns CUDA graphs off if it is 0."""

_BYTES = 1 << 29
"""The largest size in bytes of the inputs of all graphs together. The kernels of larger layers take longer than their launches."""

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

    capture: None for CUDA graphs where the launcher can be captured; otherwise nothing is captured. After a failed capture, no
    further computation is captured.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture
        self._seen: set[object] = set()
        self._captured: dict[object, _Captured] = {}
        self._failed = False
        self._lock = threading.Lock()  # a graph has one memory for all threads

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
        tensors = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        key = (tuple(features), objective, shares, _stream(target.device), tensors)
        with self._lock:
            if key not in self._captured and key in self._seen and self._can_capture(inputs):
                own = [torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor) for tensor in inputs]
                own_features = dict(zip(features, own[2:], strict=False))

                def run() -> tuple[FusedMeasurement, Tensor]:
                    results = measure_fused(own_features, own[1], None if labels is None else own[-1], objective, own[0], shares=shares)
                    return results, packed(list(tensors_of(results)))

                self._capture_computation(key, own, run)
            self._seen.add(key)
            if key in self._captured:
                return self._captured[key].run(inputs)
        return measure_fused(features, target, labels, objective, permutations, shares=shares)

    def _capture_computation(self, key: object, own: list[Tensor], run: Callable[[], tuple[FusedMeasurement, Tensor]]) -> None:
        try:
            self._capture = self._capture or CudaCapture()
            (results, together), replay = self._capture(run)
        except (RuntimeError, DriverError):  # too little memory, or a driver that cannot capture; single launches give the same results
            self._failed = True
        else:
            self._captured[key] = _Captured(own, results, together, replay)

    def close(self) -> None:
        """Free the memory of all graphs."""
        with self._lock:
            self._captured.clear()
            self._seen.clear()
            self._capture = None

    def _can_capture(self, inputs: Sequence[Tensor]) -> bool:
        used = sum(tensor.nbytes for captured in self._captured.values() for tensor in captured.inputs)
        is_small = used + sum(tensor.nbytes for tensor in inputs) <= _BYTES
        return is_small and not self._failed and (self._capture is not None or applies(inputs[0].device))


def applies(device: torch.device) -> bool:
    """Whether computations on this device are captured: the user has not turned that off, and the launcher can be captured."""
    return os.environ.get(SWITCH) != "0" and cuda.launcher(device).can_be_captured


def _stream(device: torch.device) -> int:
    """The stream on which a graph's copies and kernels follow each other."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
