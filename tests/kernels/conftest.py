"""The order of the emulated blocks and threads, and sources for the compilers."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdx.kernels import cubins
from tests.host import ORDERS, Order


@pytest.fixture(params=[pytest.param(order, marks=[pytest.mark.slow] * (order == "reverse")) for order in ORDERS])
def order(request: pytest.FixtureRequest) -> Order:
    chosen: Order = request.param
    return chosen


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder of sources and an own cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cu").write_text("one")
    (folder / "common.cuh").write_text("common")
    monkeypatch.setattr(cubins, "SOURCES", folder)
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "cache"))
    return folder
