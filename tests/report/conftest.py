"""Runs with their pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdx.report.page import write_page
from tests.made_runs import make_hostile_run, make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("plain") / "run")
    write_page(folder)
    return folder


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every name is an attack, far too long, or both."""
    folder = make_hostile_run(tmp_path_factory.mktemp("hostile") / "run")
    write_page(folder)
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a teacher."""
    folder = make_run(tmp_path_factory.mktemp("pair") / "run", teacher=False)
    write_page(folder)
    return folder
