"""The description of an exported file, which is stored in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import onnx
from google.protobuf.message import DecodeError

from kdx.disk import parse_json
from kdx.errors import KdxError, first_line
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.features.arrays import MIN_IMAGES

Shape = tuple[int | str, ...]
"""The shape of an input or output. A symbol such as ``batch`` stands for the same size in all of them."""

METADATA_PREFIX = "kdx."


@dataclass(frozen=True)
class Origin:
    """Where a network comes from: its model reference, and a hash of its weights."""

    reference: str
    weights: str


@dataclass(frozen=True)
class NetworkDescription:
    """The description of one network in a file. parameters: their number."""

    reference: str
    weights: str
    parameters: int
    preprocessing: Preprocessing
    layers: tuple[str, ...]


@dataclass(frozen=True)
class ReferenceDescription:
    """The description of an explainer file's reference images: their ids in their data set, and their labels."""

    ids: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """The description of an ONNX file that kdx wrote.

    networks: by role in an explainer file; in other files, one with the name ``network``. at: the layer of a gradients file's
    cotangent, None for the logits. scores: the names of an explainer file's scores, in order. image_size: height and width; None if
    the file takes images of any size. inputs, outputs: shapes by name, in which ``batch``, ``height``, ``width`` and ``embedding``
    stand for any number. references: of an explainer file that compares each image with them; None if it compares the images of a batch.
    pooled: whether an explainer file measures distances between spatial means.
    """

    kind: str
    networks: dict[str, NetworkDescription]
    classes: tuple[str, ...]
    precision: str
    at: str | None
    scores: tuple[str, ...]
    image_size: tuple[int, int] | None
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    versions: dict[str, str]
    references: ReferenceDescription | None = None
    pooled: bool = False

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Self:
        """From the JSON of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for any other JSON."""
        networks = {
            role: NetworkDescription(
                **{
                    **network,
                    "preprocessing": Preprocessing(**{key: tuples(value) for key, value in network["preprocessing"].items()}),
                    "layers": tuple(network["layers"]),
                }
            )
            for role, network in entries["networks"].items()
        }
        inputs, outputs = ({name: tuple(shape) for name, shape in entries[side].items()} for side in ("inputs", "outputs"))
        references = entries.get("references")
        if references is not None:
            references = ReferenceDescription(**{key: tuples(value) for key, value in references.items()})
        own = ("networks", "inputs", "outputs", "versions", "references")
        rest = {key: tuples(value) for key, value in entries.items() if key not in own}
        versions = dict(entries["versions"])
        return cls(networks=networks, versions=versions, inputs=inputs, outputs=outputs, references=references, **rest)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that give the outputs their names. Of several networks, these are the student's."""
        return self.networks["student" if "student" in self.networks else "network"].layers

    @property
    def least_images(self) -> int:
        """The smallest number of images in a batch of which the outputs mean something."""
        return MIN_IMAGES if self.kind == "explainer" and self.references is None else 1


def tuples(value: object) -> Any:
    """A JSON value with tuples in place of its lists."""
    if isinstance(value, list):
        return tuple(tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return value


def describe(path: Path) -> Description:
    """The description in the ONNX file at ``path``. Raises KdxError if it is not an ONNX file, or if kdx did not write it."""
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise KdxError(f"There is no file {path}.", "Check the path, or export the network with kdx export.") from None
    except (DecodeError, OSError) as error:
        raise KdxError(f"{path} is not a readable ONNX file.", "Export it again with kdx export.") from error
    try:
        metadata = {
            entry.key.removeprefix(METADATA_PREFIX): entry.value for entry in model.metadata_props if entry.key.startswith(METADATA_PREFIX)
        }
        entries = {key: parse_json(value) for key, value in metadata.items()}
        entries.pop("parity")
        return Description.of(entries)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise KdxError(
            f"{path} was not written by this version of kdx: its metadata is incomplete or damaged at {first_line(error)}.",
            "Export it again with kdx export.",
        ) from None


def is_export_of(path: Path, graph: FeatureGraph | GradientGraph, weights: str) -> bool:
    """Whether the file at ``path`` is an export of ``graph`` in float32, with weights of this hash, by the installed versions."""
    if not path.exists():
        return False
    try:
        description = describe(path)
    except KdxError:  # damaged, or written by another version: it must be written again
        return False
    if (description.kind, description.precision, description.versions) != (graph.kind, "fp32", versions()):
        return False
    network = description.networks["network"]
    at = graph.at if isinstance(graph, GradientGraph) else None
    return (network.weights, network.layers, network.preprocessing, description.at) == (weights, graph.layers, graph.preprocessing, at)


def shapes_by_name(values: Any) -> dict[str, Shape]:
    """The shapes of an ONNX graph's inputs or outputs."""
    return {
        value.name: tuple(size.dim_param if size.HasField("dim_param") else size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in values
    }


def versions() -> dict[str, str]:
    """The installed versions of the packages that determine a file's content."""
    from importlib.metadata import version

    return {package: version(package) for package in ("kdx", "torch", "onnx", "onnxscript")}
