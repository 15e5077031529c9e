"""Data references, splits, batches and decoding."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kdx.data.batches import _lacking, class_balanced_sample, random_batches, split
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import decoded, load_images
from kdx.errors import KdxError
from kdx.kernels import geometry


def picture(
    path: Path, colour: str | tuple[int, ...] = "red", size: tuple[int, int] = (12, 8), mode: str = "RGB", **options: object
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)  # type: ignore[arg-type]


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for index in range(count):
            picture(root / name / f"{index}.png")
    return root


# ---- opening ----


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    scans = load_digits()
    digits = open_data("digits")
    assert (len(digits), digits.classes, digits.ids[12]) == (1797, tuple("0123456789"), "digits/0012")
    np.testing.assert_array_equal(digits.labels, scans.target)
    image = np.asarray(digits.read(12))
    assert image.shape == (8, 8, 3)
    np.testing.assert_array_equal(np.rint(image[:, :, 1] / 255 * 16), scans.images[12])
    assert open_data("digits").fingerprint == digits.fingerprint


def test_class_folders_are_in_natural_order(tmp_path: Path) -> None:
    for name in ("class10/img10.PNG", "class10/img9.jpg", "class2/deep/a.webp", "Class1/b.tif"):
        picture(tmp_path / name)
    (tmp_path / "class2" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    picture(tmp_path / ".cache" / "c.png")
    picture(tmp_path / "class2" / ".hidden.png")
    found = open_data(str(tmp_path))
    assert found.classes == ("Class1", "class2", "class10")
    assert found.ids == ("Class1/b.tif", "class2/deep/a.webp", "class10/img9.jpg", "class10/img10.PNG")
    assert found.labels.tolist() == [0, 1, 2, 2]
    assert not found.splits


def test_the_fingerprint_follows_names_labels_and_files(tmp_path: Path) -> None:
    prints = {open_data(str(class_folders(tmp_path, {"a": 2, "b": 2}))).fingerprint}
    os.utime(tmp_path / "a" / "0.png", ns=(1, 1))
    prints.add(open_data(str(tmp_path)).fingerprint)
    prints.add(open_data(str(tmp_path), classes=("b", "a")).fingerprint)
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "7.png")
    prints.add(open_data(str(tmp_path)).fingerprint)
    assert len(prints) == 4


def test_prescribed_splits_are_kept(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("valid", 3), ("Test", 5)):
        class_folders(tmp_path / part, {"a": count, "b": count})
    (tmp_path / "notes").mkdir()
    found = open_data(str(tmp_path))
    parts = split(found, 0)
    assert found.classes == ("a", "b")
    assert {name: len(indices) for name, indices in parts.items()} == {"train": 40, "validation": 6, "test": 10}
    assert all(found.ids[index].startswith("Test/") for index in parts["test"])


def test_a_missing_split_is_taken_from_train(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("test", 5)):
        class_folders(tmp_path / part, {"a": count, "b": 2 * count})
    found = open_data(str(tmp_path))
    parts = split(found, 0)
    assert np.bincount(found.labels[parts["validation"]]).tolist() == [3, 6]
    assert np.bincount(found.labels[parts["train"]]).tolist() == [17, 34]
    np.testing.assert_array_equal(parts["test"], found.splits["test"])


def test_train_may_be_a_class(tmp_path: Path) -> None:
    assert open_data(str(class_folders(tmp_path, {"bus": 2, "train": 3}))).classes == ("bus", "train")


def test_cifar10_is_read_from_records(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    labels = np.array([3, 0, 9, 9, 1, 2, 3], dtype=np.uint8)
    records = np.concatenate([labels[:, None], pixels.reshape(7, -1)], axis=1)
    records[4:].tofile(tmp_path / "test_batch.bin")
    records[:4].tofile(tmp_path / "data_batch_1.bin")
    found = open_data(f"cifar10:{tmp_path}")
    assert found.labels.tolist() == labels.tolist()
    assert (found.classes[9], found.ids[5]) == ("truck", "test_batch.bin/00001")
    np.testing.assert_array_equal(np.asarray(found.read(5)), pixels[5].transpose(1, 2, 0))
    assert found.splits["test"].tolist() == [4, 5, 6]
    assert torch.equal(load_images(found, [5], (32, 32)).pixels[0], torch.from_numpy(pixels[5]) / 255)


@pytest.mark.parametrize("content", [None, b"", b"x" * 3072, bytes([10]) + b"x" * 3072])
def test_a_cifar_folder_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(KdxError):
        open_data(f"cifar10:{tmp_path}")


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="There is no folder"):
        open_data(str(tmp_path / "none"))
    with pytest.raises(KdxError, match="no images in class folders"):
        open_data(str(tmp_path))
    picture(tmp_path / "1.png")
    with pytest.raises(KdxError, match="is not a folder"):
        open_data(str(tmp_path / "1.png"))
    with pytest.raises(KdxError, match="images but no class folders"):
        open_data(str(tmp_path))
    class_folders(tmp_path, {"cat": 3})
    with pytest.raises(KdxError, match="one class only, 'cat'"):
        open_data(str(tmp_path))


def test_labels_index_the_given_classes(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 1, "dog": 2})
    assert open_data(str(tmp_path), classes=("ant", "dog", "emu", "cat")).labels.tolist() == [3, 1, 1]
    with pytest.raises(KdxError, match=r"'dog' that the models do not have.\n.*dogs"):
        open_data(str(tmp_path), classes=("cat", "dogs", "emu"))


# ---- splits and batches ----


def test_split_is_stratified_disjoint_and_seeded() -> None:
    digits = open_data("digits")
    parts = split(digits, 3)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1797))
    for label in range(10):
        size = np.sum(digits.labels == label)
        for name, share in (("train", 0.6), ("validation", 0.15), ("test", 0.25)):
            assert abs(np.sum(digits.labels[parts[name]] == label) - share * size) <= 1
    assert all(np.array_equal(parts[name], split(digits, 3)[name]) for name in parts)
    assert not np.array_equal(parts["test"], split(digits, 4)["test"])


@pytest.mark.parametrize("seed", range(8))
def test_batches_hold_every_image_once_and_each_has_target_geometry(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count, size = int(generator.integers(4, 200)), int(generator.integers(4, 40))
    labels = generator.choice(5, count, p=[0.6, 0.2, 0.1, 0.05, 0.05])
    labels[:2] = 0, 1
    batches = random_batches(labels, size, seed)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 4 and max(sizes) <= max(size, 7)
    assert all(1 < len(np.unique(labels[batch])) < len(batch) for batch in batches)
    assert all(np.array_equal(a, b) for a, b in zip(batches, random_batches(labels, size, seed), strict=True))


def test_batches_of_many_classes_hold_pairs_and_of_a_rare_class_hold_it() -> None:
    """With about as many classes as images in a batch, even dealing would leave no two images of one class together."""
    for labels in (np.repeat(np.arange(100), 20), np.repeat(np.arange(200), 2), np.repeat([0, 1], [120, 30])):
        for batch in random_batches(labels, 12, 0):
            most = np.unique(labels[batch], return_counts=True)[1].max()
            assert 2 <= most <= len(batch) - 2


def test_target_geometry_is_what_centring_leaves_of_the_classes() -> None:
    """Of every way to divide four to seven images among classes: one image beside one class tells no more than none."""
    for n in range(4, 8):
        for labels in itertools.combinations_with_replacement(range(4), n):
            d = geometry.distances(torch.nn.functional.one_hot(torch.tensor(labels)).double())
            assert (_lacking(np.array(labels)) == 0) == (float(geometry.u_centered(d).abs().max()) > 1e-9), labels


def test_a_class_too_rare_for_batches_of_this_size_is_an_error() -> None:
    with pytest.raises(KdxError, match="larger --batch"):
        random_batches(np.repeat([0, 1], [99, 1]), 10, 0)


def test_batches_differ_between_seeds() -> None:
    labels = np.arange(64) % 4
    assert not np.array_equal(random_batches(labels, 16, 0)[0], random_batches(labels, 16, 1)[0])


@pytest.mark.parametrize(("labels", "size"), [([0, 1, 0], 4), ([2] * 9, 4), ([0, 1] * 5, 3), ([], 4)])
def test_batches_too_small_for_geometry_are_refused(labels: list[int], size: int) -> None:
    with pytest.raises(KdxError):
        random_batches(np.array(labels, dtype=np.int64), size, 0)


def test_a_sample_is_as_balanced_as_it_can_be() -> None:
    labels = np.repeat([0, 1, 2], [50, 2, 9])
    for count, expected in ((3, [1, 1, 1]), (6, [2, 2, 2]), (12, [5, 2, 5]), (40, [29, 2, 9]), (99, [50, 2, 9])):
        sample = class_balanced_sample(labels, count, 0)
        assert np.bincount(labels[sample], minlength=3).tolist() == expected
        assert np.all(np.diff(sample) > 0)
    seven = [np.bincount(labels[class_balanced_sample(labels, 7, seed)], minlength=3) for seed in range(9)]
    assert all(max(counts[[0, 2]]) == 3 and sum(counts) == 7 for counts in seven)


# ---- decoding ----


def one(path: Path, image: Image.Image, **options: object) -> NDArray[np.float32]:
    """The one pixel block of an image that was saved under a class folder, decoded at its own size [3, H, W]."""
    (path / "a").mkdir(parents=True, exist_ok=True)
    picture(path / "b" / "other.png")
    file = path / "a" / f"image.{options.pop('suffix', 'png')}"
    image.save(file, **options)  # type: ignore[arg-type]
    images = load_images(open_data(str(path)), [0], (image.height, image.width))
    assert not images.unreadable
    pixels: NDArray[np.float32] = images.pixels[0].numpy()
    return pixels


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 2, 3))
    pixels = one(tmp_path, image)
    np.testing.assert_array_equal(pixels[:, 0, 0], [0, 0, 1])
    np.testing.assert_array_equal(pixels[:, 0, 3], [1, 1, 1])


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    np.testing.assert_allclose(one(tmp_path, Image.fromarray(levels))[2], [[0, 100 / 255, 1]], atol=1e-6)


def test_palettes_cmyk_and_greys_become_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), "red")
    np.testing.assert_array_equal(one(tmp_path / "p", red.convert("P"))[:, 4, 4], [1, 0, 0])
    np.testing.assert_allclose(one(tmp_path / "k", red.convert("CMYK"), suffix="jpg", quality=100)[:, 4, 4], [1, 0, 0], atol=0.02)
    np.testing.assert_array_equal(one(tmp_path / "l", Image.new("L", (8, 8), 51))[:, 4, 4], np.full(3, 0.2, dtype=np.float32))
    see_through = red.convert("P")
    np.testing.assert_array_equal(one(tmp_path / "t", see_through, transparency=see_through.getpixel((0, 0)))[:, 4, 4], [1, 1, 1])


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the upper half comes to the right
    pixels = one(tmp_path, image, exif=exif)
    assert pixels[:, :, 6:].min() > 0.9 and pixels[:, :, :2].max() < 0.1


@pytest.mark.parametrize(
    ("shape", "size"), [((40, 20), (10, 10)), ((20, 40), (10, 10)), ((7, 9), (30, 11)), ((31, 31), (8, 20)), ((1, 300), (5, 7))]
)
def test_resizing_covers_and_crops_at_the_centre(tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]) -> None:
    # A ramp across the image is a ramp across the crop, of the slope that the scale says, with the same middle.
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


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path, {"a": 4, "b": 2})
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a" / "0.png")
    content = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "0.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
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
def test_batches_decoded_ahead_are_those_decoded_alone(tmp_path: Path, workers: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (23, 9, 11, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "ab"[index % 2] / f"{index}.jpg")
    (tmp_path / "a" / "4.jpg").write_bytes(b"no picture")
    (tmp_path / "b" / "7.jpg").write_bytes(b"")
    dataset = open_data(str(tmp_path))
    batches = np.array_split(np.random.default_rng(1).permutation(23), 5)
    with decoded(dataset, iter(batches), (8, 7), workers) as found:
        ahead = list(found)
    alone = [load_images(dataset, batch, (8, 7)) for batch in batches]
    assert sorted(name for images in ahead for name, _ in images.unreadable) == ["a/4.jpg", "b/7.jpg"]
    for one, other in zip(ahead, alone, strict=True):
        assert torch.equal(one.pixels, other.pixels) and one.pixels.is_contiguous()
        assert one.kept.tolist() == other.kept.tolist() and one.unreadable == other.unreadable


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_pixel_is_its_level_over_255(tmp_path: Path, orientation: int) -> None:
    """Every level exactly, whether or not the decoder's memory is taken over."""
    levels = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.rot90(levels, -1) if orientation == 6 else levels
    expected = torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1) / 255
    assert torch.equal(torch.from_numpy(one(tmp_path, Image.fromarray(levels), exif=exif)), expected)


def test_decoding_ahead_silences_pillow_alone(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 2, "b": 2})
    with decoded(open_data(str(tmp_path)), [np.arange(2), np.arange(2, 4)], (8, 8)) as found:
        next(found)
        with pytest.raises(UserWarning, match="heard"):  # pytest makes an error of every warning that is not silenced
            warnings.warn("heard", stacklevel=1)


def test_pixels_do_not_depend_on_the_chunk() -> None:
    digits: Dataset = open_data("digits")
    whole = load_images(digits, np.arange(50), (24, 20)).pixels
    parts = [load_images(digits, np.arange(start, start + 10), (24, 20)).pixels for start in range(0, 50, 10)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.float32 and float(whole.min()) >= 0 and float(whole.max()) <= 1
