"""Explainer files for tests, their images and targets, and how results are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kdx
from kdx.choices import FilePrecision
from kdx.explain.explainer import Explainer
from kdx.explain.graph import explainer_graph
from kdx.export import onnx_file, parity
from kdx.export.description import Origin
from kdx.export.explainer_graphs import ExplainerGraph
from kdx.export.graphs import Preprocessing
from kdx.kernels import reference
from kdx.maps.decomposition import Decomposition
from kdx.models.network import Network
from kdx.models.resnet import resnet
from kdx.roles import TARGET, ScoreMap, scores_among

MAPS_AGREE = 1e-4
"""Relative to an output's largest value: both sides are float32, and a residual is a small difference of large values."""
FAINT_AGREE = 1e-3
"""Relative to the largest value of each image, which may be a hundredth of another image's."""
SCORES_AGREE = 1e-5
"""Absolute, for correlations: float32 inner products of U-centred distances."""
CLASSES = ("cat", "dog", "owl")
FIXED = (12, 10)
FILE = "nets.explainer.onnx"


@dataclass(frozen=True)
class Written:
    path: Path
    graph: ExplainerGraph
    networks: dict[str, Network]
    layers: dict[str, str]

    @property
    def roles(self) -> tuple[str, ...]:
        return self.graph.roles

    def run(self, images: Tensor, target: Tensor) -> dict[str, NDArray[np.float32]]:
        """The outputs by name, through ONNX Runtime's own interface."""
        session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {"images": images.numpy(), "target": target.numpy()}), strict=True))

    def eager(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Logits by role, and features by the student's layer and role."""
        with torch.no_grad():
            passed = {role: self.graph.network(role)(images) for role in self.roles}
        layers = {layer: {role: passed[role][1 + place] for role in self.roles} for place, layer in enumerate(self.layers)}
        return {role: outputs[0] for role, outputs in passed.items()}, layers


def network(seed: int, width: int, classes: int, preprocessing: Preprocessing, stages: int = 2) -> Network:
    torch.manual_seed(seed)
    return Network(f"kdx:resnet,width={width}@{seed}.pt", resnet(width, 1, classes, stages).eval(), preprocessing)


def written(
    folder: Path,
    networks: dict[str, Network],
    layers: dict[str, str],
    size: tuple[int, int],
    precision: FilePrecision = "fp32",
    tolerance: float = parity.TOLERANCE,
) -> Written:
    graph = explainer_graph(networks, layers)
    path = folder / FILE
    origin = {role: Origin(network.reference, network.weights_hash) for role, network in networks.items()}
    classes = CLASSES if len(networks) == 2 else ()
    onnx_file.write(graph, path, origin=origin, image_size=size, classes=classes, precision=precision, tolerance=tolerance)
    return Written(path, graph, networks, layers)


def images(n: int, size: tuple[int, int] = FIXED, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size, mode="bilinear") * 0.7 + 0.3 * torch.rand(n, 3, *size, generator=generator)


def one_hot(n: int, classes: int) -> Tensor:
    return torch.eye(classes)[torch.arange(n) % classes]


def embedding(n: int, width: int) -> Tensor:
    """Rows of four classes, each a small step away from its class."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, width, generator=generator)[torch.arange(n) % 4] + 0.1 * torch.randn(n, width, generator=generator)


def worst(actual: Any, expected: Any) -> float:
    """The largest error divided by the largest value. Infinite if an image's error is too large for that image's largest value."""
    a, b = (np.asarray(values, dtype=np.float64).reshape(len(values), -1) for values in (actual, expected))
    assert a.shape == b.shape
    errors, largest = np.abs(a - b).max(1), np.abs(b).max(1)
    faint = largest <= 1e-3 * largest.max()  # nothing but rounding, or near it
    return float(errors.max() / largest.max()) if (faint | (errors <= FAINT_AGREE * largest)).all() else float("inf")


def by_definition(features: Mapping[str, Tensor], target: Tensor) -> dict[str, float]:
    """Every score in float64, in the order of the paper."""
    rows = {role: feature.double().flatten(1) for role, feature in features.items()} | {"target": target.double()}
    centred = {name: reference.u_centered(reference.distances(matrix)) for name, matrix in rows.items()}
    actual = {}
    for name, definition in scores_among(features).items():
        score = reference.semipartial if len(definition.matrices) == 3 else reference.correlation
        actual[name] = float(score(*(centred[matrix] for matrix in definition.matrices)))
    return actual


def decomposed(kind: ScoreMap, features: Mapping[str, Tensor], target: Tensor) -> Decomposition[Tensor]:
    """`kdx.decompose` in float64 of the roles of this kind, with the target or another role's features as the target."""
    (explained, matrix), *others = kind.shares
    x, g = features[explained].double(), target if matrix == TARGET else features[matrix].double()
    other = features[others[0][0]].double() if others else None
    return kdx.decompose(x, g, minus=other) if " - " in kind.score else kdx.decompose(x, g, given=other)


def by_pytorch(networks: Mapping[str, Network], **settings: Any) -> Explainer:
    return Explainer(**{**networks, **settings}, runtime="eager")
