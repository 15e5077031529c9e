"""Network families: every kind of file agrees with PyTorch, and engines for two architectures are built without a GPU.

Two families show that the measurement works. `python -m benchmarks.families --all` measures all of them, in hours.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import all_families, families
from kdx.export import parity


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads, which `measure` sets to one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_family_exports_in_every_kind_and_builds_engines(name: str) -> None:
    rows = families.measure(f"timm:{name}")
    assert [row["kind"] for row in rows] == list(families.KINDS)
    for row in rows:
        assert "failed" not in row, row
        assert row["largest_error"] <= parity.TOLERANCE
        assert row["engines"] == dict.fromkeys(("sm_86", "sm_120"), "built")


def test_the_page_shows_the_stored_table() -> None:
    page = families.PAGE.read_text()
    assert families.filled(page, all_families.read()) == page
