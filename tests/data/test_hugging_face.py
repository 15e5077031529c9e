"""Data sets through the ``datasets`` library: every local format holds the same images."""

from __future__ import annotations

import io
import shutil
import struct
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from kdx.data import load_images, open_data
from kdx.data.dataset import located
from kdx.errors import KdxError

_LEVELS = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
_NAMES = ["owl", "hen"]
_LABELS = [0, 1, 1, 0, 1, 0]
_PARTS = {"train": range(4), "test": range(4, 6)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def png(index: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(_LEVELS[index]).save(content, "PNG")
    return content.getvalue()


def part(rows: range, **other: list[Any]) -> datasets.Dataset:
    features: dict[str, Any] = {"image": datasets.Image(), "label": datasets.ClassLabel(names=_NAMES)}
    entries = {"image": [{"bytes": png(row), "path": None} for row in rows], "label": [_LABELS[row] for row in rows], **other}
    features |= {name: datasets.Value("string") for name in other}
    return datasets.Dataset.from_dict(entries, features=datasets.Features(features))


def shard(path: Path, rows: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for row in rows:
            for suffix, content in (("png", png(row)), ("cls", str(_LABELS[row]).encode())):
                entry = tarfile.TarInfo(f"{row:04d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write(kind: str, folder: Path, repeats: int = 1) -> Path:
    """The data set in a format, with its images several times if it is saved; returns the place to open."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "saved":
        datasets.DatasetDict({name: datasets.concatenate_datasets([part(rows)] * repeats) for name, rows in _PARTS.items()}).save_to_disk(
            folder
        )
    for name, rows in _PARTS.items():
        if kind == "parquet":
            part(rows).to_parquet(folder / f"{name}-00000-of-00001.parquet")
        elif kind == "shards":
            shard(folder / f"{name}-000000.tar", rows)
        elif kind == "image folder":
            for row in rows:
                path = folder / name / _NAMES[_LABELS[row]] / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(row))
    return folder


@pytest.mark.parametrize("kind", ["saved", "parquet", "shards", "image folder"])
def test_every_format_gives_the_same_images(tmp_path: Path, kind: str) -> None:
    folder = write(kind, tmp_path / "data")
    dataset = open_data(f"hfdata:{folder}")
    assert {name: len(indices) for name, indices in dataset.splits.items()} == {"train": 4, "test": 2}
    classes = {"shards": ("0", "1"), "image folder": ("hen", "owl")}.get(kind, ("owl", "hen"))
    assert dataset.classes == classes and len(set(dataset.ids)) == 6
    names = {"0": "owl", "1": "hen"}
    contents = set()
    for split, rows in _PARTS.items():
        for index in dataset.splits[split]:
            name = dataset.classes[dataset.labels[index]]
            contents.add((split, names.get(name, name), np.asarray(dataset.read(int(index))).tobytes()))
            assert dataset.ids[index].startswith(f"{split}/")
        assert {(split, _NAMES[_LABELS[row]], _LEVELS[row].tobytes()) for row in rows} <= contents
    assert len(contents) == 6
    with ThreadPoolExecutor(4) as pool:  # rows in any order, from several threads
        order = np.random.default_rng(1).integers(0, 6, 60).tolist()
        for index, image in zip(order, pool.map(dataset.read, order), strict=True):
            assert image.tobytes() == dataset.read(index).tobytes()
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_data(f"hfdata:{moved}").fingerprint == dataset.fingerprint
    one = open_data(f"hfdata:{folder},split=train")
    assert len(one) == 4 and one.splits == {} and one.ids == tuple(f"train/{row:06d}" for row in range(4))
    assert located(f"hfdata:{tmp_path}/./data,split=train") == f"hfdata:{folder.resolve()},split=train"


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_single_files_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".tar":
        shard(path, range(6))
    else:
        part(range(6)).to_parquet(path)
    dataset = open_data(f"hfdata:{path}")
    assert dataset.labels.tolist() == _LABELS and dataset.files == {path.name: path} and dataset.splits == {}
    assert np.array_equal(np.asarray(dataset.read(3)), _LEVELS[3])


def test_columns_are_chosen(tmp_path: Path) -> None:
    kinds = ["a10", "a9", "a9", "a10", "a9", "a10"]
    part(range(6), kind=kinds).to_parquet(tmp_path / "x.parquet")
    dataset = open_data(f"hfdata:{tmp_path / 'x.parquet'},label=kind,image=image")
    assert dataset.classes == ("a9", "a10") and dataset.labels.tolist() == [1, 0, 0, 1, 0, 1]


def test_images_that_are_damaged_or_missing_are_left_out(tmp_path: Path) -> None:
    entries = [png(0), png(1)[:60], b"", None, b"text", png(5)]
    images = [None if content is None else {"bytes": content, "path": None} for content in entries]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=_NAMES)})
    datasets.Dataset.from_dict({"image": images, "label": _LABELS}, features=features).save_to_disk(tmp_path / "x")
    result = load_images(open_data(f"hfdata:{tmp_path / 'x'}"), range(6), (8, 9))
    assert result.kept.tolist() == [0, 5] and [name for name, _ in result.unreadable] == [f"train/{row:06d}" for row in (1, 2, 3, 4)]
    assert np.array_equal(np.rint(result.pixels.permute(0, 2, 3, 1).numpy() * 255), _LEVELS[[0, 5]])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (",split=dev", "has no split 'dev'"),
        (",image=picture", "no column 'picture'"),
        (",label=class", "no column 'class'"),
        (",image=score", "'score' .* does not contain images"),
        (",label=score", "neither integers nor names"),
        (",size=3", "is not a reference"),
        (",split", "is not a reference"),
        (",split=a,split=b", "is not a reference"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: str, problem: str) -> None:
    data = part(range(6), kind=["x"] * 6).add_column("score", [0.5] * 6)
    data.save_to_disk(tmp_path / "x")
    with pytest.raises(KdxError, match=problem) as caught:
        open_data(f"hfdata:{tmp_path / 'x'}{options}")
    assert caught.value.hint


def test_data_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    part(range(4)).remove_columns("label").save_to_disk(tmp_path / "unlabelled")
    part(range(4)).remove_columns("image").save_to_disk(tmp_path / "blind")
    two = part(range(4)).map(lambda row: {"other": row["label"]}).cast_column("other", datasets.ClassLabel(names=_NAMES))
    two.save_to_disk(tmp_path / "two")
    hidden = part(range(4)).cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1})
    hidden.cast_column("label", datasets.ClassLabel(names=_NAMES)).save_to_disk(tmp_path / "hidden")
    part(range(4)).filter(lambda row: False).save_to_disk(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    for name, problem in (
        ("unlabelled", "no column of classes"),
        ("empty", "has no rows"),
        ("blind", "no column of type Image"),
        ("two", "several columns of classes: label, other"),
        ("hidden", "4 of 4 images .* have no class"),
        ("notes.txt", "not a file that hfdata reads"),
    ):
        with pytest.raises(KdxError, match=problem):
            open_data(f"hfdata:{tmp_path / name}")


def test_offsets_that_leave_the_file_are_refused(tmp_path: Path) -> None:
    """Arrow does not check where the values of a file in memory begin and end, and would read any memory."""
    folder = write("saved", tmp_path)
    (file,) = folder.glob("test/*.arrow")
    first, last = len(png(4)), len(png(4)) + len(png(5))
    whole = struct.pack("<3i", 0, first, last)
    content = file.read_bytes()
    assert content.count(whole) == 1
    file.write_bytes(content.replace(whole, struct.pack("<3i", 0, 2**30, 2**30 + 1)))
    with pytest.raises(KdxError, match=r"The column 'image' of .* is damaged"):
        open_data(f"hfdata:{folder}")


def test_a_data_set_that_cannot_be_loaded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(KdxError, match=r"nobody/no-such-data cannot be loaded: .*\n.*needs a connection"):
        open_data("hfdata:nobody/no-such-data")
    assert located("hfdata:nobody/no-such-data,split=test") == "hfdata:nobody/no-such-data,split=test"
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(KdxError, match="cannot be loaded"):
        open_data(f"hfdata:{tmp_path / 'broken.parquet'}")


def test_the_package_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KdxError, match=r"needs the package datasets, which is not installed\.\n.*kdx\[hfdata\]"):
        open_data(f"hfdata:{tmp_path}")
