"""What a file exported by kdx states about itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import onnx
import torch
from google.protobuf.message import DecodeError

from kdx.errors import KdxError, first_line
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing

Shape = tuple[int | str, ...]
"""Of an input or output; a symbol such as ``batch`` stands for one size in all of them."""

FILE_PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

METADATA_PREFIX = "kdx."


@dataclass(frozen=True)
class Origin:
    """Where a network comes from: the reference that names it, and a hash that names its weights."""

    reference: str
    weights: str


@dataclass(frozen=True)
class NetworkDescription:
    """What a file says of a network in it."""

    reference: str
    weights: str
    parameters: int
    preprocessing: Preprocessing
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """What a file written by kdx says of itself.

    networks: by role in an explainer file, else one by the name ``network``. at: the layer of a gradients file's cotangent, None
    for the logits. scores: the names, in order, of an explainer file's scores. image_size: None where images of any size are
    taken. inputs, outputs: shapes by name, in which ``batch``, ``height``, ``width`` and ``embedding`` stand for any number.
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

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Self:
        """From `dataclasses.asdict` of one after its way through JSON; KeyError, TypeError or ValueError where it is none."""
        networks = {
            role: NetworkDescription(
                **{
                    **about,
                    "preprocessing": Preprocessing(**{key: tuples(value) for key, value in about["preprocessing"].items()}),
                    "layers": tuple(about["layers"]),
                }
            )
            for role, about in held["networks"].items()
        }
        shapes: dict[str, Any] = {what: {name: tuple(shape) for name, shape in held[what].items()} for what in ("inputs", "outputs")}
        rest = {key: tuples(value) for key, value in held.items() if key not in ("networks", "inputs", "outputs", "versions")}
        return cls(networks=networks, versions=dict(held["versions"]), **shapes, **rest)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that outputs are named after: the student's, where there are several networks."""
        return self.networks["student" if "student" in self.networks else "network"].layers


def tuples(value: object) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, list):
        return tuple(tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return value


def describe(path: Path) -> Description:
    """What the file at ``path`` says of itself; KdxError where it is no ONNX file or none of kdx's."""
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise KdxError(f"There is no file {path}.", "Check the path, or export the network with kdx export.") from None
    except (DecodeError, OSError) as error:
        raise KdxError(f"{path} is not a readable ONNX file.", "Export it again with kdx export.") from error
    try:
        held = {
            entry.key.removeprefix(METADATA_PREFIX): entry.value for entry in model.metadata_props if entry.key.startswith(METADATA_PREFIX)
        }
        entries = {key: json.loads(value) for key, value in held.items()}
        entries.pop("parity")
        return Description.of(entries)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise KdxError(
            f"{path} was not written by this version of kdx: its metadata lacks or garbles {first_line(error)}.",
            "Export it again with kdx export.",
        ) from None


def holds(path: Path, graph: FeatureGraph | GradientGraph, weights: str) -> bool:
    """Whether the file at ``path`` is ``graph`` in float32 with the weights of this hash, exported by these versions."""
    if not path.exists():
        return False
    try:
        found = describe(path)
    except KdxError:  # damaged, or another version's: to be written again
        return False
    if (found.kind, found.precision, found.versions) != (graph.kind, "fp32", versions()):
        return False
    network = found.networks["network"]
    at = graph.at if isinstance(graph, GradientGraph) else None
    return (network.weights, network.layers, network.preprocessing, found.at) == (weights, graph.layers, graph.preprocessing, at)


def shapes(values: Any) -> dict[str, Shape]:
    """The shapes by name of a graph's inputs or outputs."""
    return {
        value.name: tuple(size.dim_param if size.HasField("dim_param") else size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in values
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("kdx", "torch", "onnx", "onnxscript")}
