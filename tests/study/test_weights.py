"""Equal files of weights are stored once, and the content of no file changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdx.disk import write_atomic
from kdx.study.weights import SharedWeights


def written(folder: Path, **contents: bytes) -> list[Path]:
    paths = [folder / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    return paths


def test_equal_files_become_links_and_others_stay(tmp_path: Path) -> None:
    first, other, second = written(tmp_path, first=b"weights", other=b"others!", second=b"weights")
    SharedWeights().add([first, other, tmp_path / "missing", second])
    assert first.samefile(second) and not first.samefile(other)
    assert [path.read_bytes() for path in (first, other, second)] == [b"weights", b"others!", b"weights"]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_has_changed_since_is_not_linked_to(tmp_path: Path, replaced: bool) -> None:
    first, second, third = written(tmp_path, first=b"weights", second=b"weights", third=b"weights")
    weights = SharedWeights()
    weights.add([first])
    if replaced:
        write_atomic(first, b"trained again")
    else:
        first.write_bytes(b"trained again")
    weights.add([second, third])
    assert first.read_bytes() == b"trained again" and second.read_bytes() == third.read_bytes() == b"weights"
    assert second.samefile(third)
