"""The fixtures of the tests of runs: networks and pictures, and the folders of finished runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kdx.export.graphs import Preprocessing
from kdx.models import models_file
from kdx.models.resnet import resnet
from tests.runs.small_run import CLASSES, SALIENT, SIZE, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small random networks with a models file, and 29 pictures of three classes."""
    root = tmp_path_factory.mktemp("explain")
    for seed, (role, width) in enumerate((("teacher", 8), ("student", 4), ("base", 4))):
        torch.manual_seed(seed)
        save_file(resnet(width=width, depth=1, classes=3).state_dict(), root / f"{role}.safetensors")
    models_file.write_models(
        root / "models.toml",
        teacher="kdx:resnet,width=8,depth=1,classes=3@teacher.safetensors",
        base="kdx:resnet,width=4,depth=1,classes=3@base.safetensors",
        student="kdx:resnet,width=4,depth=1,classes=3@student.safetensors",
        layers=("layer2", "layer3"),
        classes=CLASSES,
        preprocessing=Preprocessing(SIZE, (0.5,), (0.5,)),
    )
    rng = np.random.default_rng(0)
    for number in range(29):
        class_folder = root / "pictures" / CLASSES[number % 3]
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 17, 3), dtype=np.uint8)).save(class_folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, out)
    return out


@pytest.fixture(scope="session")
def salient(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "salient"
    run(folder, out, SALIENT)
    return out


@pytest.fixture(scope="session")
def pair(folder: Path) -> Path:
    """The models file without its teacher."""
    lines = (folder / "models.toml").read_text().splitlines(keepends=True)
    (folder / "pair.toml").write_text("".join(line for line in lines if not line.startswith("teacher")))
    return folder / "pair.toml"


@pytest.fixture
def lines() -> list[str]:
    """Collects the lines that a run announces."""
    return []
