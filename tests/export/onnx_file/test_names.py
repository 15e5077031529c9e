"""Layers that are named as the exporter names its values, and networks in other formats than float32."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import kdx
from kdx.export import onnx_file, value_names
from kdx.export.description import Origin
from kdx.export.explainer_graphs import Graph
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 3, 12, 9, generator=torch.Generator().manual_seed(0))


class Named(nn.Module):
    """Layers whose names are those of operators, inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.add = nn.Conv2d(3, 5, 3)
        self.sub = nn.ReLU()
        self.linear = nn.Conv2d(5, 6, 2)
        self.cotangent = nn.Tanh()
        self.images = nn.Conv2d(6, 7, 1)
        self.logits = nn.Linear(7, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.cotangent(self.linear(self.sub(self.add(pixels)) + 1))
        logits: Tensor = self.logits(self.images(features).mean((2, 3)))
        return logits


def written(graph: Graph, folder: Path) -> Path:
    path = folder / "file.onnx"
    onnx_file.write(graph, path, origin=Origin("a:network", ""), image_size=(12, 9))
    return path


@pytest.mark.parametrize("kind", [FeatureGraph, pytest.param(GradientGraph, marks=pytest.mark.slow)])
def test_layers_may_have_the_names_of_operators_inputs_and_outputs(kind: type[FeatureGraph] | type[GradientGraph], tmp_path: Path) -> None:
    layers = ["add", "sub", "linear", "cotangent", "images"] + (["logits"] if kind is FeatureGraph else [])
    path = written(kind(Named().eval(), layers), tmp_path)
    feeds = {"images": IMAGES} | ({} if kind is FeatureGraph else {"cotangent": torch.eye(4)})
    with OnnxRuntimeRunner(path) as runner, EagerRunner(kind(Named(), layers), CPU) as eager:
        actual, expected = runner.run(feeds), eager.run(feeds)
    assert list(actual) == list(expected) and {"add", "feature/images", "feature/cotangent", "logits"} <= set(actual)
    assert actual["logits"].shape == (4, 4)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    features = actual["feature/images"]
    torch.testing.assert_close(features.mean((2, 3)) @ Named().logits.weight.T + Named().logits.bias, actual["logits"])


@pytest.mark.slow
def test_maps_of_a_layer_named_logits_are_those_of_the_layer(tmp_path: Path) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.logits = nn.Conv2d(3, 4, 3)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.logits(pixels).mean((2, 3))  # type: ignore[no-any-return]

    network = Renamed().eval()
    expected = (network.logits(IMAGES)[:, 2] / 70).relu()  # the weight of class 2's own channel is 1 / (10 x 7)
    torch.testing.assert_close(kdx.grad_cam(network, IMAGES, "logits", 2).maps, expected.detach())
    path = written(GradientGraph(network, ["logits"]), tmp_path)
    torch.testing.assert_close(kdx.grad_cam(path, IMAGES, "logits", 2).maps, expected.detach())


def test_values_inside_branches_are_renamed_too() -> None:
    branch = helper.make_graph([helper.make_node("Neg", ["mean"], ["out"])], "branch", [], [helper.make_empty_tensor_value_info("out")])
    inner = helper.make_node("If", ["flag"], ["value"], then_branch=branch, else_branch=branch)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [2])
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    outputs = [helper.make_tensor_value_info(value_names.placeholder(index), TensorProto.FLOAT, [2]) for index in range(2)]
    nodes = [
        helper.make_node("Abs", ["images"], ["mean"]),
        inner,
        helper.make_node("Identity", ["value"], [value_names.placeholder(0)]),
        helper.make_node("Exp", ["mean"], [value_names.placeholder(1)]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "graph", [images, flag], outputs))
    value_names.name_outputs(model, ["mean", "out"])
    onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    assert [output.name for output in graph.output] == ["mean", "out"]
    renamed = graph.node[0].output[0]
    assert renamed not in ("mean", "out")
    branches = [attribute.g for attribute in graph.node[1].attribute]
    assert all(branch.node[0].input[0] == renamed and branch.node[0].output[0] == branch.output[0].name != "out" for branch in branches)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.conv(pixels)).relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float64))]
)
@pytest.mark.parametrize("kind", [FeatureGraph, pytest.param(GradientGraph, marks=pytest.mark.slow)])
def test_a_file_of_a_network_in_another_format_has_its_weights_in_float32(
    kind: type[FeatureGraph] | type[GradientGraph], dtype: torch.dtype, tmp_path: Path
) -> None:
    network = Plain().to(dtype).eval()
    path = written(kind(network, ["conv"]), tmp_path)
    assert next(network.parameters()).dtype == dtype
    with OnnxRuntimeRunner(path) as runner:
        actual = runner.run({"images": IMAGES} | ({} if kind is FeatureGraph else {"cotangent": torch.eye(4)}))
    widened = Plain().to(dtype).float().eval()
    with torch.no_grad():
        torch.testing.assert_close(actual["logits"], widened(IMAGES))
        torch.testing.assert_close(actual["conv"], widened.conv(IMAGES))
