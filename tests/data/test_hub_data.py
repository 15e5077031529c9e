"""Data at hf:// URLs: the images, labels and splits are those of a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import httpx2
import pytest
from huggingface_hub import HfFileSystem

from kdx import remote
from kdx.data import load_images, open_data
from kdx.errors import KdxError
from tests.data.test_remote_data import check_same
from tests.data.test_remote_data import pictures as pictures
from tests.remote.hub import REPOSITORY, hub

URL = f"hf://datasets/{REPOSITORY}"


@pytest.fixture
def reads(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the files that a hub with these pictures has sent."""
    with hub(pictures) as (address, reads):
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
        remote._file_system.cache_clear()
        yield reads
    remote._file_system.cache_clear()


def test_data_on_the_hub_are_those_of_a_folder(reads: list[str], pictures: Path) -> None:
    check_same(URL, pictures)
    reads.clear()
    dataset = open_data(f"{URL}/train")
    assert reads == [], "a data set is listed, and nothing else"
    load_images(dataset, [0, 1, 2], (8, 8))
    assert sorted(reads) == sorted(name.rpartition("/")[2] for name in dataset.ids[:3]), "an image is one request"


@pytest.mark.usefixtures("reads")
def test_a_changed_image_of_equal_size_changes_the_fingerprint(pictures: Path) -> None:
    before, image = open_data(URL).fingerprint, pictures / "train/cat/0.png"
    content = image.read_bytes()
    image.write_bytes(content[::-1])
    try:
        HfFileSystem.clear_instance_cache()  # which a new process does not have
        remote._file_system.cache_clear()
        assert open_data(URL).fingerprint != before
    finally:
        image.write_bytes(content)


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("url", ["hf://datasets/someone/no-pictures", f"{URL}/no-folder", f"{URL}/no-folder/table.csv"])
def test_a_missing_repository_or_folder_is_an_error(url: str) -> None:
    with pytest.raises(KdxError, match="cannot be listed"):
        open_data(url)


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("error", [httpx2.ConnectError, httpx2.ReadTimeout, httpx2.RemoteProtocolError])
def test_a_lost_connection_is_tried_again_and_makes_no_image_unreadable(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_data(URL)
    attempts: list[str] = []

    def lost(_: HfFileSystem, path: str, **__: object) -> bytes:
        attempts.append(path)
        raise error("the connection was reset")

    monkeypatch.setattr(HfFileSystem, "cat_file", lost)
    monkeypatch.setattr("kdx.remote._SECONDS_BETWEEN_ATTEMPTS", 0.01)
    with pytest.raises(KdxError, match=r"The connection to hf://datasets/someone/pictures/.* fails: the connection was reset"):
        load_images(dataset, [0], (8, 8))
    assert len(attempts) == 3
