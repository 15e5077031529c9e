"""The graphs of explainer files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.explain.layer import LayerReferences
from kdx.export.explainer_graphs import ExplainerGraph, ReferenceGraph, References
from kdx.export.graphs import FeatureGraph
from kdx.features import arrays
from kdx.kernels import ambient
from kdx.models.layer_pairs import LayerNamesLike, layer_names
from kdx.models.network import Network
from kdx.roles import pairs_among, roles_among

_PASS = 32
"""Reference images per pass of a network."""


@dataclass(frozen=True, eq=False)
class ReferenceImages:
    """A reference set: images [m, 3, h, w] in [0, 1], and integer labels [m]."""

    images: Tensor
    labels: Tensor


@ambient.neutral()
def explainer_graph(
    networks: Mapping[str, Network], layers: LayerNamesLike, references: ReferenceImages | None = None, *, pooled: bool = False
) -> ExplainerGraph:
    """The graph of an explainer file, from the network of each role and the names of the layers (see `kdx.Explainer`).

    references: if given, the graph contains their features and compares each image with them. Otherwise it compares the images of a batch.
    pooled: as in `kdx.unicam`.

    Raises KdxError if a map compares a layer with itself (of networks with the same weights), and for references without geometry: fewer
    than four, one class, or features that are constant or not finite.
    """
    roles, names = roles_among(networks), layer_names(layers)
    hashes = {role: networks[role].weights_hash for role in roles}
    for explained, given in pairs_among(roles).values():
        if hashes[explained] == hashes[given] and any(layer.at(explained) == layer.at(given) for layer in names.values()):
            raise KdxError(
                f"The {explained} and the {given} have the same weights, so no feature sets them apart.", "Name two networks that differ."
            )
    graphs = {
        role: FeatureGraph(networks[role].module, [layer.at(role) for layer in names.values()], networks[role].preprocessing)
        for role in roles
    }
    if references is None:
        return ExplainerGraph(graphs, pooled=pooled)
    arrays.check_images(len(references.labels))
    features = {role: _features(graph, references.images) for role, graph in graphs.items()}
    at_layers = [
        LayerReferences.of({role: maps[place] for role, maps in features.items()}, references.labels, pooled=pooled)
        for place in range(len(names))
    ]
    contexts = {role: [References(layer.features[role], layer.distances[place]) for layer in at_layers] for place, role in enumerate(roles)}
    return ReferenceGraph(graphs, contexts, references.labels, pooled=pooled)


def _features(graph: FeatureGraph, images: Tensor) -> list[Tensor]:
    """A network's features of these images, one tensor per layer."""
    graph.eval()
    passes = [graph(part)[1:] for part in images.to(graph.mean).split(_PASS)]
    return [torch.cat(parts) for parts in zip(*passes, strict=True)]


def largest_size(sizes: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
    """The largest image size, by area, that a network specifies. Other networks resize it inside. KdxError if none specifies a size."""
    specified = [size for size in sizes if size is not None]
    if not specified:
        raise KdxError("No network specifies an image size.", "Give it in the models file: [preprocessing] size = [height, width].")
    return max(specified, key=lambda size: size[0] * size[1])
