"""Labels from a CSV file: the same data set as class folders, and tables that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdx import KdxError
from kdx.data import load_images, open_data, stratified_splits
from kdx.data.dataset import located


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Six images in one folder, and the same in class folders."""
    rng = np.random.default_rng(0)
    for number in range(6):
        image = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8))
        for path in (tmp_path / "flat" / f"{number}.png", tmp_path / "folders" / ("hen", "owl")[number % 2] / f"{number}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return tmp_path


def write(folder: Path, text: str) -> str:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return str(folder / "labels.csv")


def test_a_table_gives_what_class_folders_give(flat: Path) -> None:
    lines = [f"{number},flat/{number}.png,{('hen', 'owl')[number % 2]}" for number in (5, 0, 3, 1, 4, 2)]
    table = open_data(write(flat, "\ufeffnumber, path, label\n" + "\n".join(lines) + "\n"))
    folders = open_data(str(flat / "folders"))
    assert table.classes == folders.classes == ("hen", "owl")
    assert table.ids == tuple(f"flat/{number}.png" for number in range(6)) and table.labels.tolist() == [0, 1] * 3
    by_number = {Path(name).name: row for row, name in enumerate(folders.ids)}
    order = [by_number[f"{number}.png"] for number in range(6)]
    assert load_images(table, range(6), (9, 8)).pixels.equal(load_images(folders, order, (9, 8)).pixels)
    assert table.splits == {} and table.image_keys is not None
    assert located(table.reference) == str((flat / "labels.csv").resolve())


def test_the_table_may_define_splits(flat: Path) -> None:
    splits = ("train", "train", "train", "train", "val", "TEST")
    rows = [f"flat/{number}.png,{('hen', 'owl')[number % 2]},{splits[number]}" for number in range(6)]
    parts = stratified_splits(open_data(write(flat, "path,label,split\n" + "\n".join(rows))), 0)
    assert {name: part.tolist() for name, part in parts.items()} == {"train": [0, 1, 2, 3], "validation": [4], "test": [5]}


def test_the_fingerprint_follows_the_labels(flat: Path) -> None:
    rows = [f"flat/{number}.png,{('hen', 'owl')[number % 2]}" for number in range(6)]
    first = open_data(write(flat, "path,label\n" + "\n".join(rows))).fingerprint
    assert open_data(write(flat, "path,label\n" + "\n".join(reversed(rows)))).fingerprint == first
    assert open_data(write(flat, "path,label\n" + "\n".join([*rows[:-1], "flat/5.png,hen"]))).fingerprint != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nflat/0.png,hen\n", "no column 'path'"),
        ("path,class\nflat/0.png,hen\n", "no column 'label'"),
        ("", "no column 'path'"),
        ("path,label\n", "lists no images"),
        ("path,label\nflat/0.png,\n", "Entry 2 of .* has no label"),
        ("path,label\nflat/0.png\n", "Entry 2 of .* has no label"),
        ("path,label\nflat/0.png,hen\n,owl\n", "Entry 3 of .* has no path"),
        ("path,label\nflat/0.png,hen\nflat/0.png,owl\n", "'flat/0.png' .* is listed twice"),
        ("path,label\nflat/0.png,hen\nflat/7.png,owl\nflat/8.png,owl\n", "lists 2 images that do not exist, first 'flat/7.png'"),
        ("path,label,split\nflat/0.png,hen,train\nflat/1.png,owl,\n", "has the split ''"),
        ("path,label\nflat/0.png,hen\nflat/1.png,hen\n", "only one class, 'hen'"),
    ],
)
def test_tables_that_are_refused(flat: Path, text: str, message: str) -> None:
    with pytest.raises(KdxError, match=message) as caught:
        open_data(write(flat, text))
    assert caught.value.hint


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    for name in ("labels.csv", "none.csv"):
        with pytest.raises(KdxError, match="cannot be read"):
            open_data(str(tmp_path / name))
