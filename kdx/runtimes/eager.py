"""The runtime eager: PyTorch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from kdx.choices import Precision
from kdx.errors import KdxError
from kdx.export.dependence import check_dependence
from kdx.export.explainer_graphs import Graph
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing, WatchedNetwork
from kdx.kernels import ambient
from kdx.kernels.precision import tf32
from kdx.runtimes.runner import Runner, check_names


class EagerRunner(Runner):
    """PyTorch, on any device that it supports. precision: ``float32``, or ``tf32`` on a GPU."""

    runtime = "eager"

    @ambient.neutral()  # parameters that are moved in inference mode could not be used outside of it
    def __init__(self, graph: Graph, device: torch.device, precision: Precision = "float32") -> None:
        self._precision = precision
        self.device = device
        self.kind = graph.kind
        self.layers = graph.layers
        self._inputs, self._outputs = graph.input_names, graph.output_names
        self._lock = threading.Lock()
        self._checked_sizes: set[tuple[int, int]] = set()
        self._repeats_single = False
        graph.eval()
        self._graph: Graph | None = graph.to(device)
        tensors = (*graph.parameters(), *graph.buffers())
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
        self._format = dtype
        self._dtype = torch.promote_types(dtype, torch.float32)  # a network in half precision casts its inputs itself

    @property
    def graph(self) -> Graph:
        """The graph that runs. Raises ValueError on a closed runner."""
        if self._graph is None:
            raise ValueError("the runner is closed")
        return self._graph

    @ambient.neutral()
    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = self.graph
        check_names(feeds, self._inputs)
        inputs = [ambient.recordable(feeds[name].to(self.device, self._dtype)) for name in self._inputs]
        with self._lock, tf32() if self._precision == "tf32" else contextlib.nullcontext():  # a pass has hooks on the graph's layers
            self._check(graph, inputs[0])
            outputs = self._outputs_of(graph, inputs)
        return dict(zip(self._outputs, outputs, strict=True))

    def _check(self, graph: Graph, images: Tensor) -> None:
        """Check each network once per image size."""
        if images.ndim == 4 and images.numel() and (size := (images.shape[2], images.shape[3])) not in self._checked_sizes:
            check_dependence(graph, size)
            self._checked_sizes.add(size)

    def _outputs_of(self, graph: Graph, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """One pass. A network that squeezes its tensors does not run on a single image; it then runs on that image twice."""
        if len(inputs[0]) != 1 or not isinstance(graph, WatchedNetwork):
            return cast("tuple[Tensor, ...]", graph(*inputs))
        if self._repeats_single:
            return _of_image_twice(graph, inputs)
        try:
            return cast("tuple[Tensor, ...]", graph(*inputs))
        except KdxError:
            with contextlib.suppress(KdxError):
                outputs = _of_image_twice(graph, inputs)
                self._repeats_single = True
                return outputs
            raise

    @property
    def preprocessing(self) -> tuple[Preprocessing, ...]:
        return tuple(module.preprocessing for module in self.graph.modules() if isinstance(module, WatchedNetwork))

    @property
    def dtype(self) -> torch.dtype:
        return self._format

    @property
    def cotangent_layer(self) -> str | None:
        return self._gradient_graph().at

    def class_count(self, images: Tensor) -> int:
        return self.logits(images[:1]).shape[1]

    def logits(self, images: Tensor) -> Tensor:
        graph = self._gradient_graph()
        forward = EagerRunner(FeatureGraph(graph.network, (), graph.preprocessing), self.device, self._precision)  # without a backward pass
        return forward.run({"images": images})["logits"]

    def _gradient_graph(self) -> GradientGraph:
        if not isinstance(self.graph, GradientGraph):
            raise ValueError(f"a graph of {self.kind} has no cotangent")
        return self.graph

    def close(self) -> None:
        self._graph = None


def _of_image_twice(graph: Graph, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs for one image, from a pass of that image twice."""
    return tuple(output[:1] for output in graph(*(tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in inputs)))
