"""Simplified graphs, against the optimizer of PyTorch's exporter."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdx.export.simplify import simplify


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        result: Tensor = self.attention(tokens, tokens, tokens)[0] * 1 + 0
        return result.mean(1)


NETWORKS = {
    "convolutions": nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
    "attention": Attention(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch's exporter, about its own calls
@pytest.mark.parametrize("name", ["convolutions", pytest.param("attention", marks=pytest.mark.slow)])
def test_the_operators_and_results_are_those_of_the_exporters_own_optimizer(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name].eval()
    images = torch.randn(5, 8, 4, 4)
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    expected, actual = (torch.onnx.export(program, dynamo=True, verbose=False, opset_version=21, optimize=flag) for flag in (True, False))
    assert expected is not None and actual is not None
    before = len(actual.model_proto.graph.node)
    simplify(actual.model)
    models = [expected.model_proto, actual.model_proto]
    assert operators(models[1]) == operators(models[0])
    assert len(models[1].graph.node) < before
    outputs = [run(model, images[:3]) for model in models]
    np.testing.assert_array_equal(outputs[1], outputs[0])


class Clamps(nn.Module):
    """Clamps of one tensor with other bounds, which the rules fuse with others."""

    def forward(self, images: Tensor) -> Tensor:
        low, high = torch.tensor(-0.25), torch.tensor(0.75)
        return torch.cat(
            [images.clamp(low, high), images.clamp(2 * low, high), torch.relu(images).clamp(max=0.5), images.clamp(0.1).relu()]
        )


class SharedConvolution(nn.Module):
    """One convolution before two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.first, self.second = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm, scale in ((self.first, 0.5), (self.second, -2.0)):
            nn.init.constant_(norm.weight, scale)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.first(self.convolution(images)) + self.second(self.convolution(images)).relu() + self.convolution(images)
        return result


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "network",
    [
        pytest.param(Clamps(), marks=pytest.mark.slow),
        pytest.param(SharedConvolution(), marks=pytest.mark.slow),
        nn.Sequential(Clamps(), SharedConvolution()),
    ],
    ids=["clamps", "shared", "both"],
)
def test_rules_that_name_their_constants_alike_do_not_mix_them(network: nn.Module) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 8, 4, 4)
    program = torch.export.export(network.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=21, optimize=False)
    assert exported is not None
    simplify(exported.model)
    onnx.checker.check_model(exported.model_proto)
    np.testing.assert_allclose(run(exported.model_proto, images), network(images).detach().numpy(), atol=1e-5)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run(model: onnx.ModelProto, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {model.graph.input[0].name: images.numpy()})
    return np.asarray(output)
