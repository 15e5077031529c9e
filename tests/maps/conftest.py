"""A file for all tests of maps."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdx.export.graphs import Preprocessing
from tests.hooked import MEAN, STD, Net, exported
from tests.made_once import made_once


@pytest.fixture(scope="session")
def gradients_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gradients of `Net` at two layers, for images that it normalises."""

    def export(folder: Path) -> None:
        exported(folder, Net().eval(), ["conv1", "conv2"], preprocessing=Preprocessing(None, MEAN, STD))

    return made_once(tmp_path_factory, "gradients", export) / "gradients.onnx"
