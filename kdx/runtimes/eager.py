"""The runtime eager: PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from kdx.export.explainer_graphs import Graph
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.kernels import ambient
from kdx.runtimes.runner import Runner, check_names


class EagerRunner(Runner):
    """PyTorch, on any device that it supports."""

    runtime = "eager"

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self.device = device
        self.kind = graph.kind
        self.layers = graph.layers
        self._inputs, self._outputs = graph.input_names, graph.output_names
        self._lock = threading.Lock()
        self._graph: Graph | None = graph.eval().to(device)
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
        with self._lock:  # during a pass the graph has hooks on its layers
            outputs = graph(*inputs)
        return dict(zip(self._outputs, outputs, strict=True))

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
        forward = EagerRunner(FeatureGraph(graph.network, (), graph.preprocessing), self.device)  # without a backward pass
        return forward.run({"images": images})["logits"]

    def _gradient_graph(self) -> GradientGraph:
        if not isinstance(self.graph, GradientGraph):
            raise ValueError(f"a graph of {self.kind} has no cotangent")
        return self.graph

    def close(self) -> None:
        self._graph = None
