"""The computation of a layer, captured as a CUDA graph where batches have the same shapes.

For a small layer, the processor needs more time for about fifty launches than the GPU needs for the work. A graph is a single launch. It
reads from and writes to fixed memory: the features of a batch are copied into this memory, and the results are copied out of it together.
Therefore a batch does not overwrite the results of earlier batches. `SWITCH` turns the graphs off.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.errors import KdxError, first_line
from kdx.explain.fused_layer import FusedMeasurement, measure_fused
from kdx.kernels import cuda
from kdx.kernels.drivers import DriverError
from kdx.runtimes.transfers import packed, replaced, tensors_of, unpacked

SWITCH = "KDX_CUDA_GRAPHS"
"""The environment variable that turns CUDA graphs off if it is 0."""

_BYTES = 1 << 29
"""The largest size in bytes of a graph's inputs. The kernels of larger layers take longer than their launches."""

_SHARE = 16
"""The inputs of all graphs together take at most one part in so many of the device's memory. Intermediate results take about as much."""

_GRAPHS = 8
"""The largest number of graphs that are kept."""

_CAPTURING = threading.Lock()
"""PyTorch allows one capture at a time in a process."""

Capture = Callable[[Callable[[], tuple[FusedMeasurement, Tensor]]], tuple[tuple[FusedMeasurement, Tensor], Callable[[], None]]]
"""Runs a computation once and returns its results, and a function that computes them again in the same memory."""


class CudaCapture:
    """`Capture` as CUDA graphs of one device. They share the memory of their intermediate results, so all are replayed on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], tuple[FusedMeasurement, Tensor]]) -> tuple[tuple[FusedMeasurement, Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # If a capture fails, PyTorch stays on its stream; the outer block leaves that. Other threads may copy and allocate meanwhile.
        with (
            _CAPTURING,
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
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
    """Captured computations by the shapes of their inputs. A computation is captured when its shapes occur in a thread for the second time.

    capture: None for CUDA graphs where the launcher can be captured; otherwise nothing is captured. If the memory is too small for a graph,
    all are freed, and nothing is captured any more.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture
        self._seen: set[object] = set()
        self._captured: dict[object, _Captured] = {}
        self._out_of_memory = False
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
        """`measure_fused`. Raises KdxError if a graph cannot be captured for another reason than too little memory."""
        inputs = [permutations, target, *features.values()] + ([] if labels is None else [labels])
        key = (tuple(features), objective, shares, *((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs))
        seen = key, threading.get_ident()  # cuBLAS prepares itself once per thread, which cannot be captured

        def computed(of: Sequence[Tensor]) -> FusedMeasurement:
            own = dict(zip(features, of[2:], strict=False))
            return measure_fused(own, of[1], None if labels is None else of[-1], objective, of[0], shares=shares)

        if _on_the_usual_stream(target.device):
            with self._lock:
                if seen in self._seen and key not in self._captured and self._can_capture(inputs):
                    self._add(key, inputs, computed)
                if key in self._captured:
                    return self._captured[key].run(inputs)
        result = computed(inputs)
        self._seen.add(seen)
        return result

    def _add(self, key: object, inputs: Sequence[Tensor], computed: Callable[[Sequence[Tensor]], FusedMeasurement]) -> None:
        """Capture a computation. Its first results follow when it is run."""

        def run() -> tuple[FusedMeasurement, Tensor]:
            results = computed(own)
            return results, packed(list(tensors_of(results)))

        try:
            own = [torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor) for tensor in inputs]
            self._capture = self._capture or CudaCapture(inputs[0].device)
            (results, together), replay = self._capture(run)
        except torch.OutOfMemoryError:  # single launches need less
            self._out_of_memory = True
            self._captured.clear()
            self._capture = None
        except (RuntimeError, DriverError) as error:  # the state of PyTorch's allocator after that is not known
            raise KdxError(f"A CUDA graph cannot be captured: {first_line(error)}.", f"Turn graphs off with {SWITCH}=0.") from error
        else:
            self._captured[key] = _Captured(own, results, together, replay)

    def close(self) -> None:
        """Free the memory of all graphs."""
        with self._lock:
            self._captured.clear()
            self._seen.clear()
            self._capture = None

    def _can_capture(self, inputs: Sequence[Tensor]) -> bool:
        size = sum(tensor.nbytes for tensor in inputs)
        used = sum(tensor.nbytes for captured in self._captured.values() for tensor in captured.inputs)
        fits = size <= _BYTES and size + used <= _memory(inputs[0].device) // _SHARE and len(self._captured) < _GRAPHS
        return fits and not self._out_of_memory and (self._capture is not None or applies(inputs[0].device))


def applies(device: torch.device) -> bool:
    """Whether to capture computations on this device. Its launcher must support that, and the user must not have turned it off."""
    return os.environ.get(SWITCH) != "0" and cuda.launcher(device).can_be_captured


def _on_the_usual_stream(device: torch.device) -> bool:
    """Whether work is queued on the device's default stream, on which all graphs are replayed one after another."""
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def _memory(device: torch.device) -> int:
    """The bytes of a GPU's memory; on a CPU, where a stand-in replaces the graphs, there is no limit."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else sys.maxsize
