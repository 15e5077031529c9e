"""A run with networks, whose pictures have a marked square."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdx.runs.run import explain_dataset
from tests.runs.conftest import folder as folder
from tests.runs.small_run import WHOLE


@pytest.fixture(scope="session")
def explained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    models = folder / "models.toml"
    explain_dataset(str(folder / "pictures"), models, out, ["layer3"], replace(WHOLE, gallery=0), announce=lambda line: None)
    return out
