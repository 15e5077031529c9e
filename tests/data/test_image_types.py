"""Which files of a folder are images, and what is said about the others."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageFile

from kdx.data.dataset import open_data
from kdx.data.image_types import decodable_suffixes
from kdx.data.images import load_images
from kdx.errors import KdxError
from tests.data.pictures import class_folders, picture

_LOSSLESS = (".gif", ".tiff", ".TIF", ".ppm", ".pgm", ".pnm", ".tga", ".sgi", ".apng", ".dds", ".ico", ".qoi", ".PNG", ".Bmp", ".pcx")
_LOSSY = (".jfif", ".jpe", ".JPG", ".jp2", ".avif", ".webp")


@pytest.mark.parametrize("suffix", [*_LOSSLESS, *_LOSSY])
def test_every_type_that_pillow_decodes_is_an_image(tmp_path: Path, suffix: str) -> None:
    class_folders(tmp_path, {"a": 1})
    if suffix.lower() not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {suffix}")
    picture(tmp_path / "b" / f"one{suffix}", (51, 102, 153), (16, 16))
    dataset = open_data(str(tmp_path))
    assert dataset.ids == ("a/0.png", f"b/one{suffix}") and not dataset.note.startswith("Warning")
    images = load_images(dataset, [1], (16, 16))
    expected = np.array([0.2, 0.4, 0.6])
    tolerance = 0.06 if suffix in _LOSSY else 0.02
    assert not images.unreadable and np.abs(images.pixels.mean((0, 2, 3)).numpy() - expected).max() < tolerance


def test_formats_that_are_only_identified_are_not_images() -> None:
    suffixes = decodable_suffixes()
    assert not suffixes & {".h5", ".hdf", ".grib", ".bufr", ".mpg", ".eps", ".ps", ".pdf", ".txt", ""}
    for suffix in suffixes:
        factory = Image.OPEN[Image.registered_extensions()[suffix]][0]
        assert not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


def test_an_animation_counts_with_its_first_frame(tmp_path: Path) -> None:
    class_folders(tmp_path, {"b": 1})
    (tmp_path / "a").mkdir()
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("blue", "red", "lime")]
    for suffix in ("gif", "webp", "tif", "apng"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / "a" / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)  # type: ignore[arg-type]
    dataset = open_data(str(tmp_path))
    pixels = load_images(dataset, np.arange(4), (6, 6)).pixels
    assert pixels.shape[0] == 4 and np.abs(pixels.mean((2, 3)).numpy() - [0, 0, 1]).max() < 0.01
    assert dataset.note == "Only the first frame of an animation is used (2 files are of a type that can be animated)."


def test_one_line_states_what_is_left_out(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 2, "owl": 1})
    picture(tmp_path / "loose.png")
    picture(tmp_path / "cat" / "._copy.png")
    for name in ("cat/a.CR2", "cat/b.txt", "owl/c.txt", "owl/README", "owl/.DS_Store", "fox/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty\x1b[31m").mkdir()
    (tmp_path / "owl" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "owl" / "more").symlink_to(tmp_path / "cat")
    dataset = open_data(str(tmp_path))
    assert dataset.classes == ("cat", "owl") and len(dataset) == 3
    assert dataset.note == (
        "Warning: Files left out: 1 without a suffix (linked folder), 1 without a suffix (not an image type), 1 .cr2 (not decoded by "
        "Pillow), 1 .jpg (broken link), 1 .md (not an image type), 1 .png (hidden), 1 .png (in no class folder), 2 .txt (not an image "
        "type). No classes, because they contain no images: 'empty\\x1b[31m', 'fox'."
    )
    assert open_data(str(tmp_path), classes=("owl", "cat")).note == dataset.note
    assert open_data(str(class_folders(tmp_path / "plain", {"a": 1, "b": 1}))).note == ""


def test_class_folders_of_splits_without_images_are_named(tmp_path: Path) -> None:
    for split, names in (("Train", "ab"), ("val", "ab")):
        class_folders(tmp_path / split, dict.fromkeys(names, 1))
    (tmp_path / "val" / "c").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "list.csv").write_text("x")
    picture(tmp_path / "val" / "loose.gif")
    note = open_data(str(tmp_path)).note
    assert note == "Warning: Files left out: 1 .gif (in no class folder). No classes, because they contain no images: 'val/c'."


@pytest.mark.parametrize(
    ("suffix", "hint"), [(".JXL", "Install pillow-jxl-plugin, or"), (".nef", "Convert the files to PNG"), (".svg", "PNG")]
)
def test_a_class_of_undecodable_images_is_an_error(tmp_path: Path, suffix: str, hint: str) -> None:
    class_folders(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "raw").mkdir()
    for index in range(3):
        (tmp_path / "raw" / f"{index}{suffix}").write_bytes(b"x")
    with pytest.raises(KdxError, match=rf"class folder .*raw: 3 \{suffix.lower()}\.\n.*{hint}"):
        open_data(str(tmp_path))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for the package pillow_heif, which decodes .heic files that are PNG files inside."""

    def register() -> None:
        Image.register_open("HEIF", Image.OPEN["PNG"][0])
        Image.register_extension("HEIF", ".heic")

    module = ModuleType("pillow_heif")
    module.__spec__ = importlib.machinery.ModuleSpec("pillow_heif", None)
    module.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    decodable_suffixes.cache_clear()
    yield
    for table in (Image.OPEN, Image.EXTENSION):
        table.pop("HEIF", None)
        table.pop(".heic", None)
    Image.ID[:] = [name for name in Image.ID if name != "HEIF"]
    decodable_suffixes.cache_clear()


def test_types_of_installed_plugins_are_images(tmp_path: Path, plugin: None) -> None:
    class_folders(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "b" / "0.png").rename(tmp_path / "b" / "0.HEIC")
    dataset = open_data(str(tmp_path))
    assert dataset.ids == ("a/0.png", "b/0.HEIC") and not load_images(dataset, [1], (8, 8)).unreadable


def test_upper_case_folders_beside_splits_are_classes(tmp_path: Path) -> None:
    for name in ("train/deep/1.jpg", "bus/1.JPG"):
        picture(tmp_path / name)
    assert open_data(str(tmp_path)).classes == ("bus", "train")
