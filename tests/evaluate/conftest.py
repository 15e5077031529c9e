"""A run with networks, and a synthetic run without networks and data."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kdx.runs.run import explain_dataset
from tests.made_runs import make_run
from tests.runs.conftest import folder as folder
from tests.runs.small_run import WHOLE


@pytest.fixture(scope="session")
def explained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    models = folder / "models.toml"
    explain_dataset(str(folder / "pictures"), models, out, ["layer3"], replace(WHOLE, gallery=0), announce=lambda line: None)
    return out


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run", images=12, gallery=0, layers={"layer3": "layer3"}, sides=(6,))


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    """A run without networks and data."""
    return Path(shutil.copytree(original, tmp_path / "run"))
