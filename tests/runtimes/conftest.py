"""The fixtures of the tests of the runtimes: a small network, its ONNX file and its engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kdx.export import engine, onnx_file
from kdx.export.description import Origin
from kdx.models.network import weights_hash
from tests.made_once import made_once
from tests.runtimes.small_network import Small, graph


@pytest.fixture(scope="session")
def network() -> nn.Module:
    torch.manual_seed(0)
    module = Small()
    module(torch.rand(7, 3, 9, 9))  # changes the initial statistics of the norm
    return module.eval()


@pytest.fixture(scope="session")
def path(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def export(folder: Path) -> None:
        onnx_file.write(graph(network), folder / "small.onnx", origin=Origin("Small", weights_hash(network)), image_size=(11, 9))

    return made_once(tmp_path_factory, "runtime", export) / "small.onnx"


@pytest.fixture(scope="session")
def built(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx")

    def build(folder: Path) -> None:
        engine.build(path, folder / "small.engine", batch=(2, 3, 6), arch="sm_86")

    return made_once(tmp_path_factory, "engine", build) / "small.engine"
