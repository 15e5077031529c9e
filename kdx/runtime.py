"""Where a network executes: one protocol over PyTorch and ONNX Runtime."""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from kdx.errors import KdxError, first_line, missing_package
from kdx.export import onnx_file
from kdx.export.graphs import FeatureGraph

RuntimeName = Literal["auto", "eager", "onnx"]
RUNTIMES = ("auto", "eager", "onnx")


@dataclass(frozen=True)
class Outputs:
    """One pass of a network: logits [n, classes] and each layer's feature [n, C, H, W]."""

    logits: Tensor
    features: dict[str, Tensor]


class Runner(ABC):
    """A network ready to run: images in [0, 1] [n, 3, h, w] -> Outputs on ``device``. A context manager."""

    runtime: str
    device: torch.device
    layers: tuple[str, ...]

    @abstractmethod
    def infer(self, images: Tensor) -> Outputs:
        """One forward pass, without gradients."""

    @abstractmethod
    def close(self) -> None:
        """Free what the runner holds; it cannot infer afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


class EagerRunner(Runner):
    """PyTorch, on any device that PyTorch has."""

    runtime = "eager"

    def __init__(self, graph: FeatureGraph, device: torch.device) -> None:
        self.device = device
        self.layers = graph.layers
        self._lock = threading.Lock()
        self._graph: FeatureGraph | None = graph.eval().to(device)

    def infer(self, images: Tensor) -> Outputs:
        if self._graph is None:
            raise ValueError("the runner is closed")
        with self._lock, torch.no_grad():  # the graph hooks its layers for the length of a pass
            logits, *features = self._graph(images.to(self._graph.mean))
        return Outputs(logits, dict(zip(self.layers, features, strict=True)))

    def close(self) -> None:
        self._graph = None


class OrtRunner(Runner):
    """ONNX Runtime on the CPU, for a file that kdx exported."""

    runtime = "onnx"
    device = torch.device("cpu")

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise missing_package("onnxruntime", "cpu", "The runtime onnx") from None
        self.description = onnx_file.describe(path)
        self.layers = self.description.layers
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise KdxError(f"ONNX Runtime cannot load {path}: {first_line(error)}.", "Export it again with kdx export.") from error

    def infer(self, images: Tensor) -> Outputs:
        if self._session is None:
            raise ValueError("the runner is closed")
        size = self.description.image_size
        if size is not None and tuple(images.shape[2:]) != size:
            raise KdxError(
                f"The file takes images of {size[0]} x {size[1]}, and was given {images.shape[2]} x {images.shape[3]}.",
                "Resize the images, or export the network with a preprocessing size.",
            )
        results = self._session.run(None, {"images": images.float().contiguous().numpy(force=True)})
        logits, *features = (torch.from_numpy(result) for result in results)
        return Outputs(logits, dict(zip(self.layers, features, strict=True)))

    def close(self) -> None:
        self._session = None


@dataclass(frozen=True)
class Choice:
    """The runtime and device to use, and why in one line."""

    runtime: str
    device: torch.device
    why: str


def choose(runtime: RuntimeName, device: str = "auto", *, files: bool = False) -> Choice:
    """Resolve ``auto``; a runtime or device asked for by name that cannot run here is a KdxError. files: only .onnx files are given."""
    if runtime not in RUNTIMES:
        raise KdxError(f"There is no runtime {runtime!r}.", f"Choose one of {', '.join(RUNTIMES)}.")
    cuda = torch.cuda.is_available()
    gpus = ("cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))) if cuda else ()
    if device not in ("auto", "cpu", *gpus):
        raise KdxError(f"The device {device!r} cannot run here.", "Choose cpu, or see kdx doctor for what this machine can run.")
    has_onnx = importlib.util.find_spec("onnxruntime") is not None
    if runtime == "onnx" or files:
        if runtime == "eager":
            raise KdxError("An .onnx file cannot run in PyTorch.", "Choose --runtime onnx, or give the network itself.")
        if not has_onnx:
            raise missing_package("onnxruntime", "cpu", "The runtime onnx")
        if device.startswith("cuda"):
            raise KdxError("ONNX files run on the CPU in this version of kdx.", "Choose --device cpu, or --runtime eager for the GPU.")
        return Choice(
            "onnx", torch.device("cpu"), "onnx on the CPU: " + ("as asked" if runtime == "onnx" else "the networks are ONNX files")
        )
    if runtime == "eager":
        chosen = torch.device("cuda" if device == "auto" and cuda else "cpu" if device == "auto" else device)
        return Choice("eager", chosen, f"eager on {chosen}: as asked")
    if device.startswith("cuda") or (device == "auto" and cuda):
        return Choice("eager", torch.device("cuda" if device == "auto" else device), "eager on the GPU: PyTorch sees one")
    if has_onnx:
        return Choice("onnx", torch.device("cpu"), "onnx on the CPU: no GPU in use, and ONNX Runtime is faster there than PyTorch")
    return Choice("eager", torch.device("cpu"), "eager on the CPU: ONNX Runtime is not installed (pip install 'kdx[cpu]' makes it faster)")
