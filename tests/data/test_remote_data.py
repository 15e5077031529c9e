"""Data at URLs: the images, labels and splits are those of a local folder."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from kdx.cli.commands import app
from kdx.data import decoding_processes, load_images, open_data
from kdx.data.dataset import Indices, located, table_of
from kdx.data.images import _decode
from kdx.errors import KdxError
from kdx.remote import RemotePath, as_path, without_credentials
from tests.remote.server import BUCKET, Server, upload


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of two classes, a damaged image, a hidden file, and a table that lists some of the images with other labels."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = ["path,label"]
    for number in range(16):
        split, name = ("train", "test")[number // 10], ("cat", "owl")[number % 2]
        path = root / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + number % 3, 8, 3), dtype=np.uint8)).save(path)
        rows.append(f"{path.relative_to(root)},{'big' if number > 7 else 'small'}")
    (root / "train/cat/damaged.png").write_bytes(b"no image")
    (root / "train/cat/.hidden.png").write_bytes(b"hidden")
    (root / "train/readme.txt").write_text("a file that is not an image")
    (root / "table.csv").write_text("\n".join(rows))
    return root


def check_same(url: str, local: Path) -> None:
    """The data set at a URL is the local one."""
    for place in ("", "/table.csv"):
        here, there = open_data(f"{local}{place}"), open_data(f"{url}{place}")
        assert there.ids == here.ids and there.classes == here.classes and there.note == here.note
        assert np.array_equal(there.labels, here.labels)
        assert {name: list(rows) for name, rows in there.splits.items()} == {name: list(rows) for name, rows in here.splits.items()}
        images, expected = (load_images(dataset, np.arange(len(here)), (8, 8)) for dataset in (there, here))
        assert np.array_equal(images.rows, expected.rows)
        assert [name for name, _ in images.unreadable] == [name for name, _ in expected.unreadable]
        assert there.image_keys is None  # no request per image


def test_data_in_memory_are_those_of_a_folder(pictures: Path) -> None:
    upload(pictures, "memory://data/pictures")
    check_same("memory://data/pictures", pictures)


def test_the_fingerprint_changes_with_names_and_sizes(pictures: Path) -> None:
    upload(pictures / "train", "memory://data/first")
    upload(pictures / "train", "memory://data/second")
    first, second = (open_data(f"memory://data/{name}") for name in ("first", "second"))
    assert first.fingerprint == second.fingerprint
    (as_path("memory://data/second") / "cat/0.png").write_bytes(b"1")
    assert open_data("memory://data/second").fingerprint != first.fingerprint


def test_credentials_are_removed_from_references() -> None:
    assert without_credentials("s3://key:secret@bucket/a@b?X-Amz-Signature=1 next") == "s3://bucket/a@b next"
    assert without_credentials("s3://KEY:se/cr/et@bucket/a b") == "s3://bucket/a b"
    assert without_credentials("http://localhost:9000/a@b") == "http://localhost:9000/a@b"
    assert without_credentials("wds:s3://bucket/train-00?.tar,label=json.age") == "wds:s3://bucket/train-00?.tar,label=json.age"
    assert without_credentials("hfdata:someone/pictures,split=a@b") == "hfdata:someone/pictures,split=a@b"
    assert located("folder:s3://key:secret@bucket/a/") == "s3://bucket/a"
    assert str(table_of("s3://key:secret@bucket/a.csv")) == "s3://bucket/a.csv"


def test_a_path_at_a_url_is_never_used_as_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = as_path("memory://data/run") / "file"
    assert isinstance(path, RemotePath) and str(path.parent) == "memory://data/run" and path.name == "file"
    for use in (lambda: os.fspath(path), path.touch, lambda: path.rename("other"), path.rmdir):
        with pytest.raises(TypeError, match="not a path on this machine"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["demo"], ["distill", "digits", "--student", "kdx:resnet"], ["study"], ["similarity", "a", "b", "digits"]]
)
def test_commands_that_write_locally_refuse_a_url(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, "--out", "s3://bucket/run"])
    assert isinstance(result.exception, KdxError) and "writes into a local folder" in result.exception.problem
    assert not list(tmp_path.iterdir())


def test_unknown_protocols_and_missing_packages_are_errors() -> None:
    with pytest.raises(KdxError, match="not a protocol"):
        open_data("nonsense://data/pictures")
    with pytest.raises(KdxError, match="need another package"):
        open_data("gs://data/pictures")


def test_a_lost_connection_is_tried_again_and_makes_no_image_unreadable(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(pictures, "memory://data/lost")
    dataset = open_data("memory://data/lost")
    expected = load_images(dataset, [0], (8, 8)).rows
    attempts: list[str] = []
    read = MemoryFileSystem.cat_file

    def failing(self: MemoryFileSystem, path: str, **options: object) -> bytes:
        attempts.append(path)
        if len(attempts) in fails:
            raise ConnectionResetError("the connection was reset")
        return bytes(read(self, path, **options))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    monkeypatch.setattr("kdx.remote._SECONDS_BETWEEN_ATTEMPTS", 0.01)
    fails = {1, 2}
    assert np.array_equal(load_images(dataset, [0], (8, 8)).rows, expected)
    assert len(attempts) == 3
    attempts.clear()
    fails = {1, 2, 3}
    with pytest.raises(KdxError, match=r"The connection to memory://data/lost/.* fails: the connection was reset"):
        load_images(dataset, [0], (8, 8))


def test_refused_credentials_are_an_error(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "find", refused)
    with pytest.raises(KdxError, match="refuses access to memory://data/secret: Access Denied"):
        open_data("memory://data/secret")


@pytest.mark.slow
def test_data_on_s3_are_those_of_a_folder(server: Server, pictures: Path) -> None:
    url = f"s3://{BUCKET}/pictures"
    upload(pictures, url)
    check_same(url, pictures)
    server.reset()
    dataset = open_data(url)
    assert dataset.fingerprint == open_data(url).fingerprint
    assert server.counts == {"GET": 2}, "a data set is listed, and nothing else"
    load_images(dataset, [0, 1, 2], (8, 8))
    assert server.counts == {"GET": 5}, "an image is one request"


@pytest.mark.slow
def test_a_changed_image_of_equal_size_changes_the_fingerprint_on_s3(server: Server, pictures: Path) -> None:
    url = f"s3://{BUCKET}/changed"
    upload(pictures / "train", url)
    before, image = open_data(url).fingerprint, as_path(url) / "cat/0.png"
    image.write_bytes(image.read_bytes()[::-1])
    assert open_data(url).fingerprint != before


@pytest.mark.slow
def test_a_missing_bucket_or_folder_is_an_error(server: Server) -> None:
    for url in ("s3://no-bucket/pictures", f"s3://{BUCKET}/no-folder", f"s3://{BUCKET}/no-folder/table.csv"):
        with pytest.raises(KdxError, match="cannot be listed"):
            open_data(url)


@pytest.mark.slow
@pytest.mark.skipif(not decoding_processes.available(), reason="needs processes that fork")
def test_processes_decode_images_on_s3(server: Server, pictures: Path) -> None:
    """A forked process has connections of its own, and reports a lost connection as an error and not as an unreadable image."""
    upload(pictures, f"s3://{BUCKET}/forked")
    dataset = open_data(f"s3://{BUCKET}/forked")
    expected = load_images(dataset, np.arange(8), (8, 8)).rows.numpy()  # the parent has connections before it forks
    levels = np.zeros((8, 3, 8, 8), np.uint8)
    with decoding_processes.started(partial(_decode, dataset, (8, 8)), (8, 8), 2) as decode:
        for part in (slice(0, 4), slice(4, 8)):
            assert decode(np.arange(8)[part], levels[part]) == [""] * 4
    assert np.array_equal(levels, expected)

    def lost(indices: Indices, levels: NDArray[np.uint8]) -> list[str]:
        raise KdxError("The connection fails.", "Check it.")

    with decoding_processes.started(lost, (8, 8), 1) as decode, pytest.raises(KdxError, match="The connection fails"):
        decode(np.arange(4), levels[:4])
