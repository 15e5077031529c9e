"""Exported files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import GradientGraph, Preprocessing
from kdx.models.resnet import resnet
from tests.export.onnx_file.networks import PREPROCESSING, Exported, Transformer, export


@pytest.fixture(scope="session")
def resizing(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    return export(tmp_path_factory.mktemp("resizing"), resnet(4, 1, 5), ["layer3", "layer1.0.conv2"], PREPROCESSING, (15, 13))


@pytest.fixture(scope="session")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(1)
    return export(tmp_path_factory.mktemp("fixed"), Transformer(), ["block", "patch"], Preprocessing(), (12, 12))


@pytest.fixture(scope="session")
def differentiated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], tuple[Path, GradientGraph]]:
    """The gradients file of a network and its graph, with the cotangent at a layer or at the logits."""
    made: dict[str | None, tuple[Path, GradientGraph]] = {}

    def get(at: str | None) -> tuple[Path, GradientGraph]:
        if at not in made:
            torch.manual_seed(2)
            graph = GradientGraph(resnet(4, 1, 5, 2).eval(), ["layer1", "conv1"], PREPROCESSING, at)
            path = tmp_path_factory.mktemp("gradients") / "net.onnx"
            onnx_file.write(graph, path, origin=Origin("a:network", "w"), image_size=(15, 13))
            made[at] = path, graph
        return made[at]

    return get
