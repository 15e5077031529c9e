"""Exported files against PyTorch at other sizes than those of the trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.models.network import weights_hash
from kdx.models.resnet import resnet
from tests.export.onnx_file.networks import (
    PREPROCESSING,
    TOLERANCE,
    Exported,
    assert_agrees,
    assert_portable,
    export,
)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("size", [(15, 13), (31, 9), (8, 8), (3, 1)])
def test_a_resizing_file_agrees_with_its_network_at_any_batch_and_image_size(resizing: Exported, n: int, size: tuple[int, int]) -> None:
    assert_agrees(resizing, torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n)))


@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_transformers_file_agrees_with_its_network_at_any_batch_size(fixed: Exported, n: int) -> None:
    assert_agrees(fixed, torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(n)))


def test_a_file_returns_tokens_as_a_grid(fixed: Exported) -> None:
    block, patch = onnx.load(fixed.path).graph.output[1:]
    for output in (block, patch):
        assert [dim.dim_value for dim in output.type.tensor_type.shape.dim][1:] == [8, 3, 3]


def test_exporting_does_not_change_the_network(resizing: Exported) -> None:
    torch.manual_seed(0)
    assert weights_hash(resizing.graph.network) == weights_hash(resnet(4, 1, 5))
    assert all(parameter.requires_grad for parameter in resizing.graph.parameters())
    assert not any(module._forward_hooks for module in resizing.graph.modules())


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4, 11])
@pytest.mark.parametrize("at", [None, "layer2"])
def test_a_gradients_file_agrees_with_autograd(differentiated: Any, at: str | None, n: int) -> None:
    path, graph = differentiated(at)
    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, 3, 17, 9, generator=generator)
    cotangent = torch.randn(graph.cotangent_shape(images), generator=generator)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images.numpy(), "cotangent": cotangent.numpy()})
    expected = graph(images, cotangent)
    assert [output.name for output in session.get_outputs()] == list(graph.output_names)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.shape == tuple(theirs.shape)
        assert np.abs(ours - theirs.numpy()).max() <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.slow
def test_a_second_export_has_the_same_bytes(resizing: Exported, differentiated: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = export(tmp_path / "elsewhere", resnet(4, 1, 5), ["layer3", "layer1.0.conv2"], PREPROCESSING, (15, 13))
    assert features.path.read_bytes() == resizing.path.read_bytes()
    path, graph = differentiated(None)
    again = tmp_path / "other" / path.name
    onnx_file.write(copy.deepcopy(graph), again, origin=Origin("a:network", "w"), image_size=(15, 13))
    assert again.read_bytes() == path.read_bytes()
    for file_path in (features.path, again):
        assert_portable(file_path.read_bytes(), tmp_path, resizing.path.parent, path.parent)
