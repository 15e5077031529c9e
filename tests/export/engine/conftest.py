"""Files to build engines of, and one engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdx.export import engine, onnx_file
from kdx.export.description import Origin
from kdx.export.engine import EngineDescription
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models.resnet import resnet
from tests.export.engine.files import BATCH
from tests.made_once import made_once


@pytest.fixture(scope="session")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A features file of images 16 x 12."""
    return made_once(tmp_path_factory, "fixed", lambda folder: _exported(folder, None, (16, 12))) / "model.onnx"


@pytest.fixture(scope="session")
def resizing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A features file of images of any size."""
    return _exported(tmp_path_factory.mktemp("resizing"), (16, 12), (20, 15))


def _exported(folder: Path, size: tuple[int, int] | None, image_size: tuple[int, int]) -> Path:
    torch.manual_seed(0)
    path = folder / "model.onnx"
    graph = FeatureGraph(resnet(4, 1, 7, 2), ["layer1", "layer2"], Preprocessing(size, (0.4,), (0.2,)))
    onnx_file.write(graph, path, origin=Origin("tiny", "abc"), image_size=image_size)
    return path


@pytest.fixture(scope="session")
def built(fixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineDescription]:
    path = tmp_path_factory.mktemp("built") / "model.engine"
    return path, engine.build(fixed, path, batch=BATCH, arch="sm_86")


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if an engine is built."""

    def refuse(*_: object) -> bytes:
        raise AssertionError("built again")

    monkeypatch.setattr(engine, "_built", refuse)
