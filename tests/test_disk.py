"""Files that belong together are replaced together, or not at all."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from kdx.disk import csv_text, csv_value, staging
from kdx.errors import KdxError
from tests.command_line import left_in


def test_staged_files_replace_the_earlier_ones_with_the_named_file_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = Path.replace

    def recorded(file: Path, target: Path) -> Path:
        moved.append(file.name)
        return replace(file, target)

    monkeypatch.setattr(Path, "replace", recorded)
    path = tmp_path / "a folder" / "b.onnx"
    for content in ("first", "second"):
        moved.clear()
        with staging(path) as folder:
            for name in ("b.onnx", "a", "c"):
                (folder / name).write_text(content)
            assert content == "first" or path.read_text() == "first"
        assert moved[-1] == "b.onnx" and sorted(moved) == ["a", "b.onnx", "c"]
        assert {name: (path.parent / name).read_text() for name in left_in(path.parent)} == dict.fromkeys(("a", "b.onnx", "c"), content)
        assert len(list(path.parent.iterdir())) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_a_block_that_raises_leaves_the_earlier_files(error: BaseException | type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("earlier")
    with pytest.raises(KdxError if isinstance(error, OSError) else error) as caught, staging(path) as folder:  # type: ignore[arg-type]
        (folder / "a").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "earlier"
    if isinstance(caught.value, KdxError):
        assert caught.value.problem == f"{path} cannot be written: No space left on device." and "room" in caught.value.hint


def test_a_folder_in_the_place_of_the_file_is_an_error_before_the_block(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(KdxError, match="cannot be written: Is a directory"), staging(tmp_path / "a"):
        raise AssertionError
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_no_field_of_a_csv_file_is_a_formula_and_every_text_can_be_read_again() -> None:
    texts = ["=HYPERLINK(1)", "+1+1", "-x", "@SUM(A1)", "\tx", "'=x", "'quoted'", "cat", "", "RS(S) - RS(B)", "-1.5", "+inf", "−1.5"]
    written = csv_text(["@name", "text"], [["a", text] for text in texts])
    rows = list(csv.reader(io.StringIO(written)))
    assert rows[0] == ["'@name", "text"]
    assert not [row[1] for row in rows[1:] if row[1].startswith(("=", "+", "-", "@", "\t")) and row[1] not in ("-1.5", "+inf")]
    assert [csv_value(row[1]) for row in rows[1:]] == texts
    assert csv_text(["x"], [[-1.5], [None]]) == 'x\n-1.5\n""\n'  # numbers stay as they are


def test_staging_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".file.abc.partial").mkdir()
    (tmp_path / ".other.abc.partial").mkdir()
    with staging(tmp_path / "file"), staging(tmp_path / "file") as second:  # two processes at once
        (second / "file").write_bytes(b"2")
        assert len(list(tmp_path.glob(".file.*"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abc.partial", "file"]
