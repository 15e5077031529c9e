"""The fingerprint of a data set: the same however the folder is written, copied or touched, and another for other images."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdx.data import fingerprint
from kdx.data.dataset import located, open_data
from kdx.errors import KdxError
from tests.data.pictures import class_folders, picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images of three classes with different contents."""
    for number, name in enumerate(("ant/1.png", "ant/10.png", "bee/2.png", "cat/3.png", "cat/4.png")):
        picture(tmp_path / "photos" / name, (40 * number, 9, 200))
    return tmp_path / "photos"


def copied(folder: Path) -> str:
    """A copy whose files have another modification time, as after a download."""
    copy = shutil.copytree(folder, folder.parent / "elsewhere" / "copy", copy_function=shutil.copyfile)
    return str(copy)


def linked(folder: Path) -> str:
    (folder.parent / "link").symlink_to(folder)
    return str(folder.parent / "link")


def renamed(folder: Path) -> str:
    return str(folder.rename(folder.parent / "images"))


def touched(folder: Path) -> str:
    for number, path in enumerate(folder.rglob("*.png")):
        os.utime(path, (number, number))
    return str(folder)


def relative(folder: Path) -> str:
    os.chdir(folder.parent)
    return f"./{folder.name}"


def from_inside(folder: Path) -> str:
    os.chdir(folder / "ant")
    return ".."


SAME: dict[str, Callable[[Path], str]] = {
    "trailing slash": lambda folder: f"{folder}/",
    "detour": lambda folder: f"{folder}/ant/../../{folder.name}",
    "relative path": relative,
    "other working folder": from_inside,
    "symbolic link": linked,
    "copy": copied,
    "renamed folder": renamed,
    "touched files": touched,
}
"""Ways to write, move or copy a folder that leave its images as they are. Each takes the folder and returns the new reference."""


@pytest.mark.parametrize("kind", SAME)
def test_the_same_images_have_the_same_fingerprint(photos: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(photos.parent)  # restores the working folder
    before = open_data(str(photos)).fingerprint
    assert open_data(SAME[kind](photos)).fingerprint == before


def flip_a_bit(folder: Path) -> None:
    """The same name, size and modification time."""
    path = folder / "cat" / "3.png"
    state, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def swap_contents(folder: Path) -> None:
    first, second = folder / "ant" / "1.png", folder / "bee" / "2.png"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


OTHER: dict[str, Callable[[Path], object]] = {
    "changed image": flip_a_bit,
    "exchanged images": swap_contents,
    "renamed image": lambda folder: (folder / "ant" / "1.png").rename(folder / "ant" / "7.png"),
    "image in another class": lambda folder: (folder / "ant" / "1.png").rename(folder / "bee" / "1.png"),
    "renamed class": lambda folder: (folder / "ant").rename(folder / "ape"),
    "additional image": lambda folder: picture(folder / "ant" / "11.png"),
    "removed image": lambda folder: (folder / "cat" / "4.png").unlink(),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_images_have_another_fingerprint(photos: Path, kind: str) -> None:
    before = open_data(str(photos)).fingerprint
    OTHER[kind](photos)
    assert open_data(str(photos)).fingerprint != before


def test_the_fingerprint_is_the_documented_digest(photos: Path) -> None:
    """An independent computation: names and classes, names and sizes, then contents in the order of the digests of the names."""
    paths = [photos / name for name in ("ant/1.png", "ant/10.png", "bee/2.png", "cat/3.png", "cat/4.png")]
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    text = "kdx data 1\n"
    text += "".join(json.dumps([name, path.parent.name]) for name, path in zip(names, paths, strict=True))
    text += "".join(json.dumps([name, path.stat().st_size]) for name, path in zip(names, paths, strict=True))
    order = sorted(range(5), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    expected = hashlib.sha256(text.encode() + b"".join(paths[i].read_bytes() for i in order)).hexdigest()
    assert open_data(str(photos)).fingerprint == expected


def test_the_order_of_the_models_classes_does_not_matter_but_is_known_to_the_old_fingerprint(photos: Path) -> None:
    plain, other = open_data(str(photos)), open_data(str(photos), ("bee", "cat", "dog", "ant"))
    assert other.labels.tolist() == [3, 3, 0, 1, 1]
    assert other.fingerprint == plain.fingerprint and other.fingerprint_of_0_1_0 != plain.fingerprint_of_0_1_0


@pytest.mark.parametrize(("limit", "value", "hashed"), [("SAMPLE_FILES", 7, 7), ("SAMPLE_BYTES", None, 5)])
def test_of_a_large_data_set_a_sample_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int | None, hashed: int
) -> None:
    """20 files of equal size: each content is changed in turn, and only those of the sample change the fingerprint. The sample is the same
    in a copy, and every size counts."""
    class_folders(tmp_path / "a", {"ant": 10, "bee": 10})
    paths = sorted((tmp_path / "a").rglob("*.png"))
    size = paths[0].stat().st_size
    monkeypatch.setattr(fingerprint, limit, hashed * size + 1 if value is None else value)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = open_data(str(tmp_path / "a")).fingerprint
    noticed = {"a": set[str](), "b": set[str]()}
    for root, names in noticed.items():
        for path in (tmp_path / root / path.relative_to(tmp_path / "a") for path in paths):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + b"?")
            if open_data(str(tmp_path / root)).fingerprint != before:
                names.add(path.relative_to(tmp_path / root).as_posix())
            path.write_bytes(content + b"?")
            assert open_data(str(tmp_path / root)).fingerprint != before
            path.write_bytes(content)
    assert len(noticed["a"]) == hashed and noticed["a"] == noticed["b"]


def test_of_a_file_that_is_larger_than_the_sample_blocks_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a NumPy file, whose size follows from the shape of its arrays: other images leave it as it is."""
    class_folders(tmp_path, {"ant": 2, "bee": 2})
    large = tmp_path / "ant" / "0.png"
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 4000)
    monkeypatch.setattr(fingerprint, "_BLOCK_BYTES", 10)
    monkeypatch.setattr(fingerprint, "_BLOCKS", 100)
    content = np.random.default_rng(0).bytes(5000)

    def of(changed: bytes) -> str:
        large.write_bytes(changed)
        return open_data(str(tmp_path)).fingerprint

    before = of(content)
    blocks = {place + byte for place in (4990 * number // 99 for number in range(100)) for byte in range(10)}
    assert {0, 4999} < blocks and len(blocks) == 1000
    for place in (0, 9, 10, 49, 50, 60, 2500, 4989, 4990, 4999):
        changed = bytearray(content)
        changed[place] ^= 1
        assert (of(bytes(changed)) != before) == (place in blocks)
    assert of(content) == before
    (tmp_path / "bee" / "1.png").write_bytes((tmp_path / "bee" / "1.png").read_bytes()[:-1] + b"?")
    assert open_data(str(tmp_path)).fingerprint != before


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 16_385, 32_767, 32_768, 32_769, 100_000])
def test_the_key_of_an_image_is_that_of_its_size_beginning_and_end(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    ends = content if size <= 32_768 else content[:16_384] + content[-16_384:]
    expected = int(hashlib.sha256(str(size).encode() + b"\n" + ends).hexdigest()[:16], 16)
    (tmp_path / "a").write_bytes(content)
    keys = fingerprint.image_keys({"file": tmp_path / "a", "bytes": content, "lost": tmp_path / "b"})
    assert keys.tolist() == [expected, expected, 0]


def test_only_images_in_files_of_their_own_have_keys(photos: Path) -> None:
    keys = open_data(str(photos)).image_keys
    assert keys is not None and len(set(keys.tolist())) == 5
    assert open_data("digits").image_keys is None


def test_cifar10_is_recognised_elsewhere_and_changes_with_a_pixel(tmp_path: Path) -> None:
    records = np.random.default_rng(0).integers(0, 10, (6, 3073), dtype=np.uint8)
    for root in ("a", "b"):
        (tmp_path / root).mkdir()
        records.tofile(tmp_path / root / "data_batch_1.bin")
    first, second = (open_data(f"cifar10:{tmp_path / root}").fingerprint for root in ("a", "b"))
    records[5, 3000] += 1
    records.tofile(tmp_path / "b" / "data_batch_1.bin")
    assert first == second != open_data(f"cifar10:{tmp_path / 'b'}").fingerprint


def test_a_file_that_disappears_is_an_error(photos: Path) -> None:
    dataset = open_data(str(photos))
    (photos / "bee" / "2.png").unlink()
    with pytest.raises(KdxError, match=r"2\.png cannot be opened"):
        _ = dataset.fingerprint


def test_the_old_fingerprint_is_that_of_0_1_0(photos: Path) -> None:
    """An independent computation of what kdx 0.1.0 recorded for a folder with the classes of models."""
    paths = [photos / name for name in ("ant/1.png", "ant/10.png", "bee/2.png", "cat/3.png", "cat/4.png")]
    names = "\n".join(f"{path.parent.name}/{path.name}" for path in paths).encode()
    stamps = b"".join(f"{path.stat().st_size} {path.stat().st_mtime_ns}\n".encode() for path in paths)
    own = hashlib.sha256(names + np.array([0, 0, 1, 2, 2]).tobytes() + stamps).hexdigest()
    assert open_data(str(photos)).fingerprint_of_0_1_0 == own
    expected = hashlib.sha256(names + np.array([2, 2, 1, 0, 0]).tobytes() + own.encode() + b"\n").hexdigest()
    assert open_data(str(photos), ("cat", "bee", "ant")).fingerprint_of_0_1_0 == expected


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("digits", "digits"), ("photos/", "{here}/photos"), ("cifar10:./c", "cifar10:{here}/c"), ("link", "{here}/photos")],
)
def test_references_become_absolute(photos: Path, monkeypatch: pytest.MonkeyPatch, reference: str, expected: str) -> None:
    monkeypatch.chdir(photos.parent)
    linked(photos)
    assert located(reference) == expected.format(here=photos.parent.resolve())
