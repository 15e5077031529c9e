"""The interface of an Explainer's networks, and the record of a single network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from kdx.data.inputs import InputFormat
from kdx.explain.batch_target import BatchTarget
from kdx.explain.layer import PendingMeasurement
from kdx.export.description import Description, NetworkDescription
from kdx.export.graphs import Preprocessing
from kdx.models.layer_pairs import LayerNames
from kdx.models.network import Network
from kdx.models.source_code import code_hash
from kdx.runtimes.choice import Choice


@dataclass(frozen=True)
class NetworkRecord:
    """What is known about the network of a role.

    reference: the model reference that names it. sha256: the hash of its weights. parameters: how many it has. preprocessing: what it
    does to its images. image_size: the (height, width) that it takes, or None for any. trained: False if some weights are known to
    be random. code: the hash of the user's own source code that defines it (`kdx.models.source_code`), or None.
    """

    reference: str
    sha256: str
    parameters: int
    preprocessing: Preprocessing
    image_size: tuple[int, int] | None
    trained: bool
    code: str | None = None

    @classmethod
    def of_network(cls, network: Network) -> Self:
        size = network.preprocessing.size
        code = code_hash(network.reference, network.module)
        return cls(network.reference, network.weights_hash, network.parameters, network.preprocessing, size, network.trained, code)

    @classmethod
    def of_file(cls, network: NetworkDescription, file: Description) -> Self:
        """The record of a network in an exported file. The file may take one image size even if the network does not resize."""
        size = network.preprocessing.size or file.image_size
        return cls(network.reference, network.weights, network.parameters, network.preprocessing, size, True)


class NetworkSet(Protocol):
    """The networks of an Explainer, and the measurements of what they compute: one runner per network, or one explainer file.

    roles: in the order of `kdx.roles.MEASURED`. layers: each role's names by the student's. choice: the runtime and device, and the
    reason. classes: the names of the classes; () if they are not known.
    """

    roles: tuple[str, ...]
    layers: dict[str, LayerNames]
    choice: Choice
    classes: tuple[str, ...]

    @property
    def input_format(self) -> InputFormat:
        """The images that the networks take."""

    def open(self, image_size: tuple[int, int], images: int | None = None, runtime: str | None = None, batch: int | None = None) -> None:
        """Prepare for images of this size. A second call does nothing.

        images: how many will be explained, for ``auto``. runtime: the runtime that has already computed a part of them, for ``auto``.
        batch: the largest number of images in a call, for which engines are built.
        """

    def networks(self) -> dict[str, NetworkRecord]:
        """The record of each role's network."""

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Each role's logits, and per layer each role's features [n, C, H, W]."""

    def use_references(self, images: Tensor, labels: Tensor) -> None:
        """UniCAM maps every later image among these images instead of the others of its call."""

    def begin(self, images: Tensor, batch: BatchTarget) -> tuple[dict[str, Tensor], dict[str, PendingMeasurement]]:
        """Each role's logits [n, classes], and one measurement per layer, of images [n, 3, h, w] in [0, 1]. Both are on the device, which
        may not have computed the results yet."""

    def close(self) -> None:
        """Free the networks and delete temporary files."""
