"""The outputs of explainer graphs do not depend on the unit of the features, also where float32 cannot represent their squares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdx.explain.graph import ReferenceImages, explainer_graph
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import Preprocessing
from kdx.models.network import Network
from tests import oracle
from tests.explain.written_files import FIXED, images, one_hot

N = 13
UNITS = [2.0**-99, 2.0**-40, 2.0**-31, 2.0**31, 2.0**83]


class _Scaled(nn.Module):
    """The features of the module "layer" are in another unit than those of "conv", which the head removes."""

    def __init__(self, unit: float, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.layer, self.head = nn.Conv2d(3, 6, 3), nn.Identity(), nn.Linear(6, 3)
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer(self.conv(x).relu() * self.unit)
        logits: Tensor = self.head(features.mean((2, 3)) / self.unit)
        return logits


def _networks(unit: float) -> dict[str, Network]:
    return {role: Network(role, _Scaled(unit, seed).eval(), Preprocessing()) for seed, role in enumerate(("student", "base"))}


def _agree(actual: Mapping[str, Any], expected: Mapping[str, Tensor], unit: float) -> None:
    for name, value in expected.items():
        factor = {"distances": unit, "weights": 1 / unit}.get(name.rsplit("/", 1)[-1], 1.0) if name.startswith("layer/") else 1
        assert float(value.abs().max()) > 0, name
        assert oracle.error(torch.as_tensor(actual[name]).double() / factor, value) < 1e-5, name


def _outputs(unit: float, references: ReferenceImages | None, *inputs: Tensor) -> dict[str, Tensor]:
    graph = explainer_graph(_networks(unit), {"conv": "conv", "layer": "layer"}, references)
    with torch.no_grad():
        return dict(zip(graph.output_names, graph(*inputs), strict=True))


@pytest.mark.parametrize("unit", UNITS)
def test_graphs(unit: float) -> None:
    pixels, target, labels = images(N), one_hot(N, 3), torch.arange(N) % 3
    expected = _outputs(1.0, None, pixels, target)
    _agree(_outputs(unit, None, pixels, target), expected, unit)
    _agree(_outputs(unit, None, pixels, target * unit), expected, unit)
    references = ReferenceImages(pixels, labels)
    queries = images(5, seed=1), labels[:5]
    _agree(_outputs(unit, references, *queries), _outputs(1.0, references, *queries), unit)


@pytest.mark.exhaustive
@pytest.mark.slow  # writing two files takes twenty seconds
@pytest.mark.parametrize("unit", [2.0**-83, 2.0**83])
def test_files_in_onnx_runtime(unit: float, tmp_path: Path) -> None:
    pixels, labels = images(N), torch.arange(N) % 3
    for references, inputs in (
        (None, {"images": pixels, "target": one_hot(N, 3)}),
        (ReferenceImages(pixels, labels), {"images": images(2, seed=1), "labels": labels[:2]}),
    ):
        networks, path = _networks(unit), tmp_path / "file.onnx"
        origin = {role: Origin(role, network.weights_hash) for role, network in networks.items()}
        onnx_file.write(explainer_graph(networks, {"layer": "layer"}, references), path, origin=origin, image_size=FIXED)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        actual = dict(zip(names, session.run(None, {name: value.numpy() for name, value in inputs.items()}), strict=True))
        expected = _outputs(1.0, references, *inputs.values())
        _agree(actual, {name: expected[name] for name in names}, unit)
        path.unlink()
