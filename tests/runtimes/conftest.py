"""The fixtures of the tests of the runtimes: a small network, its ONNX file and its engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kdx.export import engine, onnx_file
from kdx.export.description import Origin
from kdx.models.network import weights_hash
from tests.runtimes.small_network import Small, graph


@pytest.fixture(scope="session")
def network() -> nn.Module:
    torch.manual_seed(0)
    module = Small()
    module(torch.rand(7, 3, 9, 9))  # changes the initial statistics of the norm
    return module.eval()


@pytest.fixture(scope="session")
def path(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runtime") / "small.onnx"
    onnx_file.write(graph(network), path, origin=Origin("Small", weights_hash(network)), image_size=(11, 9))
    return path


@pytest.fixture(scope="session")
def built(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("engine") / "small.engine"
    engine.build(path, to, batch=(2, 3, 6), arch="sm_86")
    return to
