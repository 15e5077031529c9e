"""Network families: every kind of file agrees with PyTorch, and engines for two architectures are built without a GPU.

Small networks of two families show that the measurement works. `python -m benchmarks.families --all` measures all of them, in hours.
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
@pytest.mark.parametrize(
    "reference", [pytest.param("kdx:resnet,width=8,depth=1", marks=pytest.mark.exhaustive), "timm:vit_tiny_patch16_224,img_size=64,depth=3"]
)
def test_a_family_exports_in_every_kind_and_builds_engines(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, reference, lambda: families._reference(reference))
    rows = families.measure(reference)
    assert [row["kind"] for row in rows] == list(families.KINDS)
    for row in rows:
        assert "failed" not in row, row
        assert row["largest_error"] <= parity.TOLERANCE
        assert row["engines"] == dict.fromkeys(("sm_86", "sm_120"), "built")


def test_the_page_shows_the_stored_table() -> None:
    page = families.PAGE.read_text()
    assert families.filled(page, all_families.read()) == page
