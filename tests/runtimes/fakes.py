"""Stand-ins for ONNX Runtime and TensorRT on a machine without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.runtimes.small_network import graph


class FakeOnnxRuntime:
    """ONNX Runtime as it would be with a GPU: which provider it has, starts, and gives which nodes."""

    __version__ = "1.0"

    def __init__(self, started: str = "CUDAExecutionProvider", stray: str = "Shape", compiled: bool = True) -> None:
        self.started, self.stray, self.compiled = started, stray, compiled
        self.entries: dict[str, str] = {}
        self.providers: list[tuple[str, dict[str, str]]] = []
        self.SessionOptions = lambda: SimpleNamespace(add_session_config_entry=self.entries.__setitem__)
        test = self

        class InferenceSession:
            def __init__(self, _path: Path, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
                test.providers = providers

            def disable_fallback(self) -> None:
                pass

            def get_providers(self) -> list[str]:
                return [test.started, "CPUExecutionProvider"]

            def get_provider_graph_assignment_info(self) -> list[Any]:
                nodes = {test.started: "Conv", "CPUExecutionProvider": test.stray}
                return [
                    SimpleNamespace(ep_name=name, get_nodes=lambda op=op: [SimpleNamespace(op_type=op, name="n")])
                    for name, op in nodes.items()
                ]

        self.InferenceSession = InferenceSession

    def get_available_providers(self) -> list[str]:
        return ["CPUExecutionProvider", *(["CUDAExecutionProvider"] if self.compiled else [])]

    def preload_dlls(self) -> None:
        pass

    def set_default_logger_severity(self, severity: int) -> None:
        pass


class FakeKernelCache:
    """TensorRT-RTX's cache of compiled kernels: what it contained at first, and one more kernel."""

    content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content
        return True

    def serialize(self) -> bytes:
        return self.content + b"kernel;"


class FakeTensorRT:
    """TensorRT with the network of `network` on the CPU: it reads and writes at the addresses of its tensors."""

    __version__ = "1.7.1.116"

    def __init__(self, network: nn.Module, refuses: str = "") -> None:
        self.graph, self.refuses = graph(network), refuses
        self.used: FakeKernelCache | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.Runtime = lambda _log: self
        self.cache = FakeKernelCache()
        self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager")
        self.settings = SimpleNamespace(
            dynamic_shapes_kernel_specialization_strategy="lazy",
            create_runtime_cache=lambda: self.cache,
            set_runtime_cache=lambda cache: setattr(self, "used", cache),
        )
        self.create_runtime_config = lambda: self.settings
        self.context_settings: tuple[Any, ...] = ()
        self.deserialize_cuda_engine = lambda data: None if refuses == "engine" else self

    def create_execution_context(self, *settings: Any) -> FakeTensorRT | None:
        self.context_settings = settings
        return None if self.refuses == "context" else self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.refuses != "shape"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        shape = self.shapes["images"]
        pixels = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses["images"])
        with torch.no_grad():
            outputs = self.graph(torch.from_numpy(np.array(pixels, np.float32)).view(shape))
        for name, output in zip(self.graph.output_names, outputs, strict=True):
            flat = output.contiguous().numpy()
            ctypes.memmove(self.addresses[name], flat.ctypes.data, flat.nbytes)
        return True


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        self.taken = self._taken

    @contextmanager
    def _taken(self) -> Iterator[int]:
        yield 4711

    def synchronize(self) -> None:
        pass
