"""Exported graphs contain the layout that was decided, whatever the order of the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import kdx
import kdx.runtimes.choice
from kdx.export import onnx_file
from kdx.export.description import Origin, describe
from kdx.export.graphs import FeatureGraph, GradientGraph
from tests.export.patch_networks import PATCH, Patches

GRID = (3, 5)
SIZE = (GRID[0] * PATCH, GRID[1] * PATCH)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["layer", "layer:tokens(prefix=1,grid=3x5)"])
def test_files_of_features_and_gradients(tmp_path: Path, layer: str) -> None:
    shuffled = [int(place) for place in np.random.default_rng(1).permutation(15)]
    network = Patches(GRID, shuffled if layer == "layer" else None, extra=(0,)).eval()
    pixels = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    origin = Origin("patches", "0" * 64)
    onnx_file.write(FeatureGraph(network, [layer]), tmp_path / "features.onnx", origin=origin, image_size=SIZE)
    onnx_file.write(GradientGraph(network, [layer]), tmp_path / "gradients.onnx", origin=origin, image_size=SIZE)
    assert describe(tmp_path / "features.onnx").layers == (layer,)
    expected = network.expected(pixels).detach()
    with kdx.runtimes.choice.open_file(tmp_path / "features.onnx", kdx.runtimes.choice.choose("onnx", "cpu", files=True)) as runner:
        torch.testing.assert_close(runner.infer(pixels).features[layer], expected, rtol=1e-4, atol=1e-5)
    maps = kdx.grad_cam(tmp_path / "gradients.onnx", pixels, layer, 2).maps
    weighted = torch.einsum("c,nchw->nhw", network.head.weight[2].detach() / 16, expected)  # the logits are a mean over 16 tokens
    torch.testing.assert_close(maps, weighted.relu(), rtol=1e-4, atol=1e-5)
