"""The interface of every runtime: a graph that is ready to run, with named tensors as inputs and outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.export.description import Description, Shape
from kdx.export.graphs import Preprocessing
from kdx.export.layer_names import output_name


@dataclass(frozen=True)
class NetworkOutputs:
    """One pass of a network: logits [n, classes] and the feature [n, C, H, W] of each layer."""

    logits: Tensor
    features: dict[str, Tensor]


class Runner(ABC):
    """A graph that is ready to run. Inputs are named tensors; outputs are named tensors on ``device``. A context manager.

    kind: ``features``, ``gradients`` or ``explainer``. It determines the names of the inputs and outputs (`kdx.export.graphs`).
    """

    runtime: str
    device: torch.device
    kind: str
    layers: tuple[str, ...]

    @abstractmethod
    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass: every output by its name, without gradients.

        feeds: every input by its name, of any number type, layout and device. Later passes do not change the results.

        Raises ValueError for names that are not the graph's inputs and on a closed runner, and KdxError for shapes that the
        runner does not take.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the network. The runner cannot run afterwards; a second call does nothing."""

    @property
    def max_batch(self) -> int | None:
        """The largest number of images per pass; None for no limit."""
        return None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """The (height, width) of the images that the runner takes; None for any."""
        return None

    @property
    @abstractmethod
    def preprocessing(self) -> tuple[Preprocessing, ...]:
        """The preprocessing of each network in the graph."""

    @property
    def dtype(self) -> torch.dtype:
        """The number format in which the network computes; its outputs are float32 or float64."""
        return torch.float32

    @property
    @abstractmethod
    def cotangent_layer(self) -> str | None:
        """For a gradients graph: the layer whose cotangent is an input, or None for the logits' cotangent."""

    @abstractmethod
    def class_count(self, images: Tensor) -> int:
        """For a gradients graph: the number of classes. A runner that does not know it runs the first image."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """For a gradients graph: the logits [n, classes], which do not depend on the cotangent."""

    def infer(self, images: Tensor) -> NetworkOutputs:
        """One pass of a features graph over images [n, 3, h, w] in [0, 1]."""
        if self.kind != "features":
            raise ValueError(f"a graph of {self.kind} is not one of features; use run")
        outputs = self.run({"images": images})
        return NetworkOutputs(outputs["logits"], {layer: outputs[output_name(layer)] for layer in self.layers})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


def input_dtype(name: str) -> torch.dtype:
    """The number type of a file's input: int64 for labels, and float32 for every other input."""
    return torch.int64 if name == "labels" else torch.float32


class FileRunner(Runner):
    """The runner of an exported file, in a runtime that reads and writes PyTorch's memory in place."""

    description: Description
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    """Shapes by name."""

    def _set_file(self, path: Path, description: Description, device: torch.device) -> None:
        """Set the attributes that come from the file and its description, and the device."""
        self._path = path
        self.description = description
        self.kind, self.layers = description.kind, description.layers
        self.device = device

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self.description.image_size

    @property
    def preprocessing(self) -> tuple[Preprocessing, ...]:
        return tuple(network.preprocessing for network in self.description.networks.values())

    @property
    def dtype(self) -> torch.dtype:
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.description.precision, torch.float32)

    @property
    def cotangent_layer(self) -> str | None:
        return self.description.at

    def class_count(self, images: Tensor) -> int:
        return int(self.outputs["logits"][1])

    def logits(self, images: Tensor) -> Tensor:
        # A file has one graph, so this pass also computes the gradients. The logits do not depend on the cotangent.
        return self.run({"images": images, "cotangent": images.new_zeros(len(images), self.class_count(images))})["logits"]

    def _prepared(self, feeds: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The inputs as the runtime reads them, contiguous on the device, and the size of each symbolic dimension."""
        check_names(feeds, self.inputs)
        sizes: dict[str, int] = {}
        for name, shape in self.inputs.items():
            _check_shape(name, tuple(feeds[name].shape), shape, sizes)
        return {name: feeds[name].detach().to(self.device, input_dtype(name)).contiguous() for name in self.inputs}, sizes

    def _empty_outputs(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Uninitialised memory for every output."""
        return {
            name: torch.empty([sizes[size] if isinstance(size, str) else size for size in shape], dtype=torch.float32, device=self.device)
            for name, shape in self.outputs.items()
        }


def check_names(feeds: Mapping[str, Tensor], names: Collection[str]) -> None:
    if set(feeds) != set(names):
        raise ValueError(f"the graph takes {', '.join(names)}, not {', '.join(feeds) or 'nothing'}")


def _check_shape(name: str, actual: tuple[int, ...], shape: Shape, sizes: dict[str, int]) -> None:
    """KdxError for an input that does not fit. Adds the sizes of the shape's symbols to ``sizes``."""
    if len(actual) == len(shape):
        for size, expected in zip(actual, shape, strict=True):
            if isinstance(expected, str) and sizes.setdefault(expected, size) != size:
                raise KdxError(f"The {expected} of {name} is {size}, and that of another input is {sizes[expected]}.", "Make them equal.")
        if all(isinstance(expected, str) or size == expected for size, expected in zip(actual, shape, strict=True)):
            if 0 in actual:
                raise KdxError(f"The input {name} is empty: its shape is {list(actual)}.", "Give at least one image.")
            return
        if name == "images" and actual[1] == shape[1]:
            raise KdxError(
                f"The file takes images of {shape[2]} x {shape[3]}, not {actual[2]} x {actual[3]}.",
                "Resize the images, or export the network with a preprocessing size.",
            )
    expected_shape = ", ".join(str(size) for size in shape)
    raise KdxError(f"The file takes {name} [{expected_shape}], not {list(actual)}.", "Give an input of that shape.")


def missing_layer(source: object, layer: str, layers: Iterable[str]) -> KdxError:
    """The error for a layer that a file or runner, the ``source``, does not contain."""
    return KdxError(f"{source} does not contain the layer {layer!r}.", f"It contains {', '.join(layers)}; export it with the layer.")


def parts(runner: Runner, chunk: int | None, n: int) -> Iterator[slice]:
    """Slices of n images, each of at most ``chunk`` images and of at most the number that the runner takes."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be 1 or more, not {chunk}")
    most = min(size for size in (chunk or n, runner.max_batch or n))
    return (slice(start, min(start + most, n)) for start in range(0, n, most))
