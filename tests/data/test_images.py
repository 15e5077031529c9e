"""Decoding: colours, orientation, resizing, unreadable files, and prefetched batches."""

from __future__ import annotations

import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kdx.choices import Interpolation, Resizing
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import decoded, load_images
from kdx.data.pixels import fit
from tests.data.pictures import class_folders, picture


def decode(path: Path, image: Image.Image, **options: object) -> NDArray[np.float32]:
    """The pixels [3, H, W] of an image that is saved in a class folder and decoded at its own size."""
    (path / "a").mkdir(parents=True, exist_ok=True)
    picture(path / "b" / "other.png")
    file = path / "a" / f"image.{options.pop('suffix', 'png')}"
    image.save(file, **options)  # type: ignore[arg-type]
    images = load_images(open_data(str(path)), [0], (image.height, image.width))
    assert not images.unreadable
    pixels: NDArray[np.float32] = images.pixels[0].numpy()
    return pixels


def test_alpha_is_composited_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 2, 3))
    pixels = decode(tmp_path, image)
    np.testing.assert_array_equal(pixels[:, 0, 0], [0, 0, 1])
    np.testing.assert_array_equal(pixels[:, 0, 3], [1, 1, 1])


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    np.testing.assert_allclose(decode(tmp_path, Image.fromarray(levels))[2], [[0, 100 / 255, 1]], atol=1e-6)


def test_palettes_cmyk_and_greys_become_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), "red")
    np.testing.assert_array_equal(decode(tmp_path / "p", red.convert("P"))[:, 4, 4], [1, 0, 0])
    np.testing.assert_allclose(decode(tmp_path / "k", red.convert("CMYK"), suffix="jpg", quality=100)[:, 4, 4], [1, 0, 0], atol=0.02)
    np.testing.assert_array_equal(decode(tmp_path / "l", Image.new("L", (8, 8), 51))[:, 4, 4], np.full(3, 0.2, dtype=np.float32))
    see_through = red.convert("P")
    np.testing.assert_array_equal(decode(tmp_path / "t", see_through, transparency=see_through.getpixel((0, 0)))[:, 4, 4], [1, 1, 1])


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise, so the upper half becomes the right half
    pixels = decode(tmp_path, image, exif=exif)
    assert pixels[:, :, 6:].min() > 0.9 and pixels[:, :, :2].max() < 0.1


def _exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of one directory. entries: tag, type, count, and four bytes: the value or its offset."""
    rows = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", 0)


_DAMAGE = {
    "rational without a value": (0x011A, 5, 1, struct.pack("<I", 60_000)),
    "rational of zero values": (0x011A, 5, 0, b"\0\0\0\0"),
    "number where text belongs": (0x010F, 3, 1, b"\x07\0\0\0"),
    "text where a rational belongs": (0x011A, 2, 4, b"abc\0"),
    "unknown type": (0x0131, 99, 1, b"\0\0\0\0"),
    "directory outside the data": (0x8769, 4, 1, struct.pack("<I", 50_000)),
    "directory that contains itself": (0x8769, 4, 1, struct.pack("<I", 8)),
    "directory of text": (0x8769, 2, 4, b"abc\0"),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("damage", list(_DAMAGE))
def test_damaged_exif_data_leave_the_pixels_and_the_orientation(tmp_path: Path, suffix: str, damage: str) -> None:
    image = Image.new("RGB", (8, 16), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = _exif((0x0112, 3, 1, b"\x08\0\0\0"), _DAMAGE[damage])  # 8: shown after a quarter turn to the left
    picture(tmp_path / "b" / "x.png")
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / f"x.{suffix}", exif=exif, **{"lossless": True} if suffix == "webp" else {})  # type: ignore[arg-type]
    images = load_images(open_data(str(tmp_path)), [0], (8, 16))
    assert not images.unreadable
    assert images.pixels[..., :6].min() > 0.9 and images.pixels[..., 10:].max() < 0.1


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\x08", b"Exif\0\0XX", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\xff" * 40])
def test_exif_data_without_structure_are_ignored(tmp_path: Path, exif: bytes) -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))
    pixels = decode(tmp_path, image, exif=exif, suffix="jpg", quality=100)
    assert pixels[..., :3].min() > 0.9 and pixels[..., 5:].max() < 0.1


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_those_of_pillow(tmp_path: Path, orientation: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / "b" / "x.png")
    for index, suffix in enumerate(("png", "tif")):
        path = tmp_path / "a" / f"{index}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(levels).save(path, exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        pixels = load_images(open_data(str(tmp_path)), [index], expected.shape[:2]).pixels[0].permute(1, 2, 0)
        np.testing.assert_array_equal(np.rint(pixels.numpy() * 255), expected)


@pytest.mark.parametrize(
    ("shape", "size"), [((40, 20), (10, 10)), ((20, 40), (10, 10)), ((7, 9), (30, 11)), ((31, 31), (8, 20)), ((1, 300), (5, 7))]
)
def test_resizing_covers_and_crops_at_the_centre(tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]) -> None:
    # A ramp across the image is a ramp across the crop, with the slope of the scale and the same middle.
    height, width = shape
    ramp = np.broadcast_to(np.linspace(0, 255, width), shape)
    (tmp_path / "a").mkdir()
    picture(tmp_path / "b" / "other.png")
    Image.fromarray(np.rint(ramp).astype(np.uint8)).save(tmp_path / "a" / "ramp.png")
    pixels = load_images(open_data(str(tmp_path)), [0], size).pixels
    assert pixels.shape == (1, 3, *size)
    row = pixels[0, 0, size[0] // 2].numpy()
    scale = max(size[0] / height, size[1] / width)
    positions = ((np.arange(size[1]) + 0.5 - size[1] / 2) / scale + width / 2 - 0.5) / max(1, width - 1)
    inner = slice(2, -2)
    np.testing.assert_allclose(row[inner], positions[inner], atol=0.6 / (width * scale) + 0.012)


def test_unreadable_images_are_listed_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path, {"a": 4, "b": 2})
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a" / "0.png")
    content = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "0.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "a" / "1.png").write_bytes(b"not an image")
    (tmp_path / "a" / "2.png").write_bytes(b"")
    picture(tmp_path / "a" / "3.png", size=(200, 200))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30000)
    images = load_images(open_data(str(tmp_path)), [4, 3, 2, 1, 0, 5], (8, 8))
    assert images.kept.tolist() == [4, 5]
    assert images.pixels.shape == (2, 3, 8, 8)
    assert [name for name, _ in images.unreadable] == ["a/3.png", "a/2.png", "a/1.png", "a/0.png"]
    assert images.unreadable[0][1].startswith("DecompressionBomb")
    (tmp_path / "b" / "0.png").unlink()
    assert load_images(open_data(str(tmp_path)), [0], (8, 8)).pixels.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetched_batches_equal_batches_decoded_separately(tmp_path: Path, workers: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (23, 9, 11, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "ab"[index % 2] / f"{index}.jpg")
    (tmp_path / "a" / "4.jpg").write_bytes(b"not an image")
    (tmp_path / "b" / "7.jpg").write_bytes(b"")
    dataset = open_data(str(tmp_path))
    batches = np.array_split(np.random.default_rng(1).permutation(23), 5)
    with decoded(dataset, iter(batches), (8, 7), workers) as prefetched:
        results = list(prefetched)
    expected = [load_images(dataset, batch, (8, 7)) for batch in batches]
    assert sorted(name for images in results for name, _ in images.unreadable) == ["a/4.jpg", "b/7.jpg"]
    for images, reference in zip(results, expected, strict=True):
        assert torch.equal(images.pixels, reference.pixels) and images.pixels.is_contiguous()
        assert images.kept.tolist() == reference.kept.tolist() and images.unreadable == reference.unreadable


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_pixel_is_its_level_over_255(tmp_path: Path, orientation: int) -> None:
    """Every level exactly, whether or not the memory of the decoder is reused."""
    levels = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.rot90(levels, -1) if orientation == 6 else levels
    expected = torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1) / 255
    assert torch.equal(torch.from_numpy(decode(tmp_path, Image.fromarray(levels), exif=exif)), expected)


def test_prefetching_silences_only_the_warnings_of_pillow(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 2, "b": 2})
    with decoded(open_data(str(tmp_path)), [np.arange(2), np.arange(2, 4)], (8, 8)) as prefetched:
        next(prefetched)
        with pytest.raises(UserWarning, match="from the caller"):  # pytest turns every warning that is not silenced into an error
            warnings.warn("from the caller", stacklevel=1)


def test_pixels_do_not_depend_on_the_chunk() -> None:
    digits: Dataset = open_data("digits")
    whole = load_images(digits, np.arange(50), (24, 20)).pixels
    parts = [load_images(digits, np.arange(start, start + 10), (24, 20)).pixels for start in range(0, 50, 10)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.float32 and float(whole.min()) >= 0 and float(whole.max()) <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("source", [(41, 30), (20, 57), (9, 9)])
def test_images_are_brought_to_a_size_as_pillow_does(tmp_path: Path, source: tuple[int, int], interpolation: Interpolation) -> None:
    """Pillow's own functions, with `ImageOps.pad` for the letterbox, are the independent computation."""
    levels = np.random.default_rng(0).integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
    image, method = Image.fromarray(levels), Image.Resampling[interpolation.upper()]
    picture(tmp_path / "b" / "0.png")
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png")

    def loaded(mode: str) -> NDArray[np.float32]:
        dataset = replace(open_data(str(tmp_path)), resizing=Resizing(mode, interpolation))  # type: ignore[arg-type]
        pixels: NDArray[np.float32] = load_images(dataset, [0], (18, 24)).pixels[0].permute(1, 2, 0).numpy() * 255
        return pixels

    np.testing.assert_allclose(loaded("squash"), np.asarray(image.resize((24, 18), method)), atol=1e-3)
    np.testing.assert_allclose(loaded("letterbox"), np.asarray(ImageOps.pad(image, (24, 18), method, color=(128,) * 3)), atol=1e-3)
    scale = max(24 / image.width, 18 / image.height)
    whole = image.resize((max(24, round(image.width * scale)), max(18, round(image.height * scale))), method)
    left, top = (whole.width - 24) // 2, (whole.height - 18) // 2
    np.testing.assert_allclose(loaded("cover"), np.asarray(whole)[top : top + 18, left : left + 24], atol=1e-3)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (90_000, 3)])
def test_a_very_long_image_takes_little_memory(size: tuple[int, int]) -> None:
    """Its middle is shown, as for any other image, without resizing the whole image, which would have billions of pixels."""
    width, height = size
    values = np.tile(np.arange(max(size), dtype=np.float64)[:, None], (1, min(size)))
    values = (values if height > width else values.T) * 255 / max(size)
    fitted = np.asarray(fit(Image.fromarray(values.astype(np.uint8)), (224, 224)))
    assert fitted.shape == (224, 224) and abs(int(fitted.mean()) - 127) <= 1


def test_a_long_image_is_resized_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resizing only a part gives the crop of the whole resized image, except for rounding."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 400, 3), dtype=np.uint8))
    whole = np.asarray(fit(image, (16, 16))).astype(int)
    monkeypatch.setattr("kdx.data.pixels._LARGEST", 1)
    assert np.abs(np.asarray(fit(image, (16, 16))).astype(int) - whole).max() <= 1
