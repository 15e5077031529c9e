"""WebDataset shards and Parquet files: their images and labels are those of the folder from which they were written."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kdx.data import load_images, open_data
from kdx.data.dataset import Dataset, located
from kdx.data.sources import parquet_files
from kdx.errors import KdxError
from kdx.remote import as_path
from tests.remote.server import BUCKET, Server, upload

CLASSES = ("cat", "dog", "owl")
COUNT = 24


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 pictures of three classes, named so that natural order is the order of their numbers."""
    root = tmp_path_factory.mktemp("shards") / "pictures"
    rng = np.random.default_rng(1)
    for number in range(COUNT):
        path = root / CLASSES[number % 3] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def paths(pictures: Path) -> list[Path]:
    return sorted(pictures.rglob("*.png"), key=lambda path: path.name)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, pictures: Path, label: str = "cls") -> None:
    """Three shards of eight images with labels, and members that must be ignored."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(3):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for path in paths(pictures)[8 * shard : 8 * shard + 8]:
                name = path.parent.name
                if label == "cls":
                    add(tar, f"{path.stem}.cls", str(CLASSES.index(name)).encode())
                add(tar, path.name, path.read_bytes())
                if label == "json":
                    add(tar, f"{path.stem}.json", json.dumps({"species": name, "label": 7}).encode())
                add(tar, f"{path.stem}.pkl", pickle.dumps({"label": 1}))


def check_equal(dataset: Dataset, pictures: Path) -> None:
    """The images of the data set are those of the folder, with their classes, in the order of their numbers."""
    expected = open_data(str(pictures))
    order = np.argsort([name.rpartition("/")[2] for name in expected.ids])
    assert [dataset.classes[label] for label in dataset.labels] == [expected.classes[label] for label in expected.labels[order]]
    random = np.random.default_rng(0).permutation(len(dataset))
    actual, wanted = load_images(dataset, random, (32, 32)), load_images(expected, order[random], (32, 32))
    assert np.array_equal(actual.rows, wanted.rows) and not actual.unreadable


def named(tmp_path: Path) -> Path:
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    return tmp_path / "names.txt"


def test_shards_are_the_folder(pictures: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", pictures)
    names = named(tmp_path)
    for pattern in ("shards", "shards/*.tar", "shards/{000..002}.tar", "shards/{000,001,002}.tar"):
        dataset = open_data(f"wds:{tmp_path}/{pattern},classes={names}")
        check_equal(dataset, pictures)
        assert dataset.ids[0] == "000.tar/0000"
        assert dataset.note.startswith("Images are read one by one from 3 shards, in any order") and "24 .pkl" in dataset.note
    assert open_data(f"wds:{tmp_path}/shards").classes == ("0", "1", "2")


def test_labels_are_in_a_field_of_json(pictures: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", pictures, "json")
    check_equal(open_data(f"wds:{tmp_path}/shards,label=json.species,image=png"), pictures)
    with pytest.raises(KdxError, match="no images with labels"):
        open_data(f"wds:{tmp_path}/shards,label=json.nothing")


def test_the_index_is_stored_and_follows_the_shard(pictures: Path, tmp_path: Path, cache: Path) -> None:
    write_shards(tmp_path / "shards", pictures)
    reference = f"wds:{tmp_path}/shards,classes={named(tmp_path)}"
    first = open_data(reference)
    stored = sorted((cache / "shards").iterdir())
    assert len(stored) == 3
    assert open_data(reference).ids == first.ids and sorted((cache / "shards").iterdir()) == stored
    stored[0].write_text("damaged")
    check_equal(open_data(reference), pictures)
    with tarfile.open(tmp_path / "shards/002.tar", "a") as tar:
        add(tar, "0099.cls", b"1")
        add(tar, "0099.png", paths(pictures)[0].read_bytes())
    again = open_data(reference)
    assert again.ids == (*first.ids, "002.tar/0099") and again.fingerprint != first.fingerprint


def header(size: bytes, kind: bytes = b"0") -> bytes:
    """A member's header with this size field and type, after a valid member, and with a valid checksum."""
    content = bytearray(tarfile.TarInfo("0.png").tobuf())
    content[124:136], content[156:157], content[148:156] = size, kind, b" " * 8
    content[148:156] = f"{sum(content):06o}\0 ".encode()
    return tarfile.TarInfo("1.cls").tobuf() + bytes(content) + bytes(1024)


def test_compressed_damaged_and_missing_shards_are_errors(pictures: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, pictures)
    whole = (tmp_path / "000.tar").read_bytes()
    for name, content, problem in (
        ("gzip.tar", gzip.compress(whole), r"compressed \(gzip\)"),
        ("noise.tar", b"no tar" * 200, "not a tar file or is damaged"),
        ("empty.tar", b"", "not a tar file or is damaged"),
        ("cut.tar", whole[: len(whole) // 2], "not a tar file or is damaged"),
        ("second.tar", whole[:1024] + b"damaged!" * 64 + whole[1536:], "there is no header at byte 1024"),
        ("negative.tar", header(b"\xff" * 11 + b"\x00"), "not a tar file or is damaged"),
        ("long.tar", header(b"77777777777\0", b"x"), "not a tar file or is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(KdxError, match=problem):
            open_data(f"wds:{tmp_path / name}")
    with pytest.raises(KdxError, match="There are no shards"):
        open_data(f"wds:{tmp_path}/{{000..003}}.tar")
    with pytest.raises(KdxError, match="not a reference"):
        open_data(f"wds:{tmp_path},nonsense=1")


def bytes_read() -> int:
    """The bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes with /proc")
def test_an_image_of_a_shard_is_read_alone(pictures: Path, tmp_path: Path) -> None:
    """A shard of 10 MB: neither its index nor one of its images needs the rest."""
    with tarfile.open(tmp_path / "large.tar", "w") as tar:
        for number in range(10):
            add(tar, f"{number}.cls", str(number % 2).encode())
            add(tar, f"{number}.png", paths(pictures)[number].read_bytes())
            add(tar, f"{number}.npy", bytes(1_000_000))
    before = bytes_read()
    dataset = open_data(f"wds:{tmp_path}/large.tar")
    indexed = bytes_read()
    assert indexed - before < 1_000_000
    dataset.read(7)
    assert bytes_read() - indexed < 30_000


def table(pictures: Path, labels: Any, *, structs: bool) -> pa.Table:
    contents = [path.read_bytes() for path in paths(pictures)]
    images = [{"bytes": content, "path": None} for content in contents] if structs else contents
    return pa.table({"picture": images, "label": labels})


def test_parquet_files_are_the_folder(pictures: Path, tmp_path: Path) -> None:
    names = [path.parent.name for path in paths(pictures)]
    pq.write_table(table(pictures, names, structs=False), tmp_path / "one.parquet", row_group_size=5)
    check_equal(open_data(f"parquet:{tmp_path}/one.parquet"), pictures)
    numbered = table(pictures, [CLASSES.index(name) for name in names], structs=True)
    check_equal_parts(numbered, tmp_path / "parts")
    check_equal(open_data(f"parquet:{tmp_path}/parts,label=label,image=picture,classes={named(tmp_path)}"), pictures)
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": list(CLASSES)}}}}
    pq.write_table(numbered.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "hub.parquet")
    check_equal(open_data(f"parquet:{tmp_path}/hub.parquet"), pictures)


def check_equal_parts(whole: pa.Table, folder: Path) -> None:
    """Write the rows as two splits, and check the splits."""
    folder.mkdir()
    pq.write_table(whole.slice(0, 16), folder / "train-00000-of-00001.parquet", row_group_size=4)
    pq.write_table(whole.slice(16), folder / "train-00001-of-00001.parquet", row_group_size=4)
    (folder / "train-00001-of-00001.parquet").rename(folder / "validation-00000-of-00001.parquet")
    splits = open_data(f"parquet:{folder}").splits
    assert {name: list(rows) for name, rows in splits.items()} == {"train": list(range(16)), "validation": list(range(16, 24))}


@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes with /proc")
def test_an_image_of_a_parquet_file_needs_its_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rng, contents = tmp_path / "rows.parquet", np.random.default_rng(0), []
    for _ in range(COUNT):
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(content, "PNG", compress_level=0)
        contents.append({"bytes": content.getvalue(), "path": None})
    pq.write_table(pa.table({"picture": contents, "label": [number % 2 for number in range(COUNT)]}), path, row_group_size=4)
    group = path.stat().st_size / 6  # 480 kB
    before = bytes_read()
    dataset = open_data(f"parquet:{path}")
    opened = bytes_read()
    assert opened - before < group, "labels and footer only"
    dataset.read(9)
    first = bytes_read()
    assert group / 2 < first - opened < 2 * group
    dataset.read(10)
    assert bytes_read() - first < 2_000, "the row group is still in memory"
    monkeypatch.setattr(parquet_files, "_KEPT_BYTES", int(1.5 * group))
    dataset.read(1)
    last = bytes_read()
    dataset.read(9)
    assert bytes_read() - last > group / 2, "the row group had to leave"
    monkeypatch.setattr(parquet_files, "_KEPT_BYTES", int(group / 2))
    with pytest.raises(KdxError, match="all of which must be read"):
        open_data(f"parquet:{path}")


def test_parquet_files_without_images_or_labels_are_errors(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(table(pictures, [1.5] * COUNT, structs=False), path)
    problems = {",label=nothing": "no column 'nothing'", ",image=label": "no column 'label' of images", "": "neither integers"}
    for options, problem in problems.items():
        with pytest.raises(KdxError, match=problem):
            open_data(f"parquet:{path}{options}")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(KdxError, match="cannot be read"):
        open_data(f"parquet:{path}")


def test_values_that_are_nested_too_deeply_name_nothing(pictures: Path, tmp_path: Path) -> None:
    nested = "[" * 50_000
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, path in enumerate(paths(pictures)[:4]):
            add(tar, path.name, path.read_bytes())
            add(tar, f"{path.stem}.json", (nested if number == 3 else json.dumps({"label": number % 2})).encode())
    assert len(open_data(f"wds:{tmp_path / '0.tar'},label=json.label").ids) == 3
    table = pa.table({"image": [path.read_bytes() for path in paths(pictures)[:4]], "label": [0, 1, 0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": nested}), tmp_path / "0.parquet")
    assert open_data(f"parquet:{tmp_path / '0.parquet'}").classes == ("0", "1")


def test_located_references_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"wds:{tmp_path.resolve()}/{{0..9}}.tar,label=cls,classes={tmp_path.resolve()}/names.txt"
    assert located("wds:{0..9}.tar,label=cls,classes=names.txt") == expected
    assert located("parquet:s3://key:secret@bucket/a,label=x") == "parquet:s3://bucket/a,label=x"


def test_shards_and_parquet_files_may_be_at_a_url(pictures: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", pictures)
    pq.write_table(table(pictures, [path.parent.name for path in paths(pictures)], structs=False), tmp_path / "one.parquet")
    for path in (*(tmp_path / "shards").iterdir(), tmp_path / "one.parquet"):
        (as_path("memory://shards") / path.relative_to(tmp_path).as_posix()).write_bytes(path.read_bytes())
    check_equal(open_data(f"wds:memory://shards/shards/{{000..002}}.tar,classes={named(tmp_path)}"), pictures)
    check_equal(open_data("parquet:memory://shards/one.parquet"), pictures)


@pytest.mark.slow
def test_requests_of_shards_on_s3(server: Server, pictures: Path, tmp_path: Path) -> None:
    """The shards are scanned once. After that, opening the data needs one listing, and an image one request."""
    write_shards(tmp_path / "shards", pictures)
    upload(tmp_path / "shards", f"s3://{BUCKET}/shards")
    reference = f"wds:s3://{BUCKET}/shards/{{000..002}}.tar,classes={named(tmp_path)}"
    check_equal(open_data(reference), pictures)
    server.reset()
    dataset = open_data(reference)
    assert server.counts == {"GET": 1}
    load_images(dataset, [3, 17, 9], (32, 32))
    assert server.counts == {"GET": 4}
    assert dataset.fingerprint == open_data(reference).fingerprint
