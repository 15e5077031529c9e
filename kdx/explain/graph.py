"""The graph of an explainer file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kdx.errors import KdxError
from kdx.export.graphs import ExplainerGraph, FeatureGraph
from kdx.models.network import Network
from kdx.roles import maps_among, roles_among, scores_among


def explainer_graph(networks: Mapping[str, Network], layers: Mapping[str, str]) -> ExplainerGraph:
    """The graph of an explainer file, from the network of each role and the student's and base's layer to the teacher's.

    Raises KdxError if student and base have the same weights.
    """
    roles = roles_among(networks)
    if len({networks[role].weights_hash for role in ("student", "base")}) == 1:
        raise KdxError("The student and the base have the same weights, so no feature sets them apart.", "Name two networks that differ.")
    graphs = {
        role: FeatureGraph(networks[role].module, [*(layers.values() if role == "teacher" else layers)], networks[role].preprocessing)
        for role in roles
    }
    matrices = {name: definition.matrices for name, definition in scores_among(roles).items()}
    return ExplainerGraph(graphs, maps_among(roles), matrices)


def largest_size(sizes: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
    """The largest image size, by area, that a network specifies. Other networks resize it inside. KdxError if none specifies a size."""
    specified = [size for size in sizes if size is not None]
    if not specified:
        raise KdxError("No network specifies an image size.", "Give it in the models file: [preprocessing] size = [height, width].")
    return max(specified, key=lambda size: size[0] * size[1])
