"""What every runtime gives: a graph ready to run, named tensors in and named tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.export.description import Description, Shape


@dataclass(frozen=True)
class NetworkOutputs:
    """One pass of a network: logits [n, classes] and each layer's feature [n, C, H, W]."""

    logits: Tensor
    features: dict[str, Tensor]


class Runner(ABC):
    """A graph ready to run: named tensors in, named tensors on ``device`` out. A context manager.

    kind: ``features``, ``gradients`` or ``explainer``, which says what the names are (`kdx.export.graphs`).
    """

    runtime: str
    device: torch.device
    kind: str
    layers: tuple[str, ...]

    @abstractmethod
    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass: every output by its name, without gradients. feeds: every input, of any number type, layout and device.

        The results are the caller's: a later pass leaves them alone. Raises ValueError for names that are not the graph's
        inputs and on a closed runner, KdxError for shapes that the runner does not take.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the runner holds; it cannot run afterwards."""

    @property
    def max_batch(self) -> int | None:
        """The most images that one pass takes; None if any number will do."""
        return None

    @property
    @abstractmethod
    def cotangent_layer(self) -> str | None:
        """Of a gradients graph: the layer whose cotangent goes in, or None for the logits'."""

    @abstractmethod
    def class_count(self, images: Tensor) -> int:
        """Of a gradients graph: the number of classes that the network has. A runner that does not know it runs the first image."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """Of a gradients graph: the logits [n, classes], which need no cotangent."""

    def infer(self, images: Tensor) -> NetworkOutputs:
        """One pass of a features graph over images in [0, 1] [n, 3, h, w]."""
        if self.kind != "features":
            raise ValueError(f"a graph of {self.kind} has no features alone; use run")
        found = self.run({"images": images})
        return NetworkOutputs(found["logits"], {layer: found[layer] for layer in self.layers})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


class FileRunner(Runner):
    """A file that kdx exported, in a runtime that reads and writes PyTorch's memory in place."""

    description: Description
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    """Shapes by name."""

    @property
    def cotangent_layer(self) -> str | None:
        return self.description.at

    def class_count(self, images: Tensor) -> int:
        return int(self.outputs["logits"][1])

    def logits(self, images: Tensor) -> Tensor:
        # A file has one graph, so the gradients are computed too. The logits do not depend on the cotangent.
        return self.run({"images": images, "cotangent": images.new_zeros(len(images), self.class_count(images))})["logits"]

    def _fed(self, feeds: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The inputs as the runtime reads them, contiguous float32 on the device, and the size of each symbol."""
        check_names(feeds, self.inputs)
        sizes: dict[str, int] = {}
        for name, shape in self.inputs.items():
            _check_shape(name, tuple(feeds[name].shape), shape, sizes)
        return {name: feeds[name].detach().to(self.device, torch.float32).contiguous() for name in self.inputs}, sizes

    def _empty(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Memory for every output."""
        return {
            name: torch.empty([sizes[size] if isinstance(size, str) else size for size in shape], device=self.device)
            for name, shape in self.outputs.items()
        }


def check_names(feeds: Mapping[str, Tensor], names: Collection[str]) -> None:
    if set(feeds) != set(names):
        raise ValueError(f"the graph takes {', '.join(names)}, and was given {', '.join(feeds) or 'nothing'}")


def _check_shape(name: str, given: tuple[int, ...], shape: Shape, sizes: dict[str, int]) -> None:
    """KdxError where an input does not fit; ``sizes`` learns what its symbols stand for."""
    if len(given) == len(shape):
        for size, expected in zip(given, shape, strict=True):
            if isinstance(expected, str) and sizes.setdefault(expected, size) != size:
                raise KdxError(f"The {expected} of {name} is {size}, and of another input {sizes[expected]}.", "Give both the same number.")
        if all(isinstance(expected, str) or size == expected for size, expected in zip(given, shape, strict=True)):
            if 0 in given:
                raise KdxError(f"The input {name} is empty: its shape is {list(given)}.", "Give at least one image.")
            return
        if name == "images" and given[1] == shape[1]:
            raise KdxError(
                f"The file takes images of {shape[2]} x {shape[3]}, and was given {given[2]} x {given[3]}.",
                "Resize the images, or export the network with a preprocessing size.",
            )
    wanted = ", ".join(str(size) for size in shape)
    raise KdxError(f"The file takes {name} [{wanted}], and was given {list(given)}.", "Give it in that shape.")


def layer_not_held(what: object, layer: str, held: Iterable[str]) -> KdxError:
    """The error of a layer that was asked for of a file or runner that holds others."""
    return KdxError(f"{what} does not hold the layer {layer!r}.", f"It holds {', '.join(held)}; export it with the layer.")


def parts(runner: Runner, chunk: int | None, n: int) -> Iterator[slice]:
    """Slices of n images: of ``chunk`` images each, and of no more than the runner takes at once."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be 1 or more, not {chunk}")
    most = min(size for size in (chunk or n, runner.max_batch or n))
    return (slice(start, min(start + most, n)) for start in range(0, n, most))
