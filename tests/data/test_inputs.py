"""What users pass as images: every form gives the same pixels, and wrong ranges are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, TensorDataset

from kdx import KdxError
from kdx.data.class_folders import list_images
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.data.inputs import InputFormat, as_pixels, labelled
from kdx.data.pixels import pixels_of, to_rgb
from kdx.export.graphs import Preprocessing

LEVELS = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
"""Four RGB images of height 6 and width 5."""
EXPECTED = torch.from_numpy(LEVELS.astype(np.float32) / np.float32(255)).permute(0, 3, 1, 2)
NORMALISED = InputFormat.of([Preprocessing(mean=(0.5,), std=(0.2,))])


def written(folder: Path) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(len(LEVELS))]
    for path, image in zip(paths, LEVELS, strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_every_form_of_the_same_images_gives_the_same_pixels(tmp_path: Path) -> None:
    paths, tensor = written(tmp_path), torch.from_numpy(LEVELS)
    forms: list[Any] = [
        LEVELS,
        LEVELS.transpose(0, 3, 1, 2),
        tensor,
        tensor.permute(0, 3, 1, 2),
        EXPECTED,
        EXPECTED.numpy().transpose(0, 2, 3, 1),
        list(LEVELS),
        list(EXPECTED),
        tuple(map(Image.fromarray, LEVELS)),
        paths,
        [str(paths[0]), Image.fromarray(LEVELS[1]), LEVELS[2], EXPECTED[3].numpy()],
        DataLoader(TensorDataset(EXPECTED, torch.arange(4)), batch_size=3),
        [(EXPECTED[:1], [0]), (LEVELS[1:], [1, 2, 3])].__iter__(),
    ]
    for form in forms:
        assert torch.equal(as_pixels(form, NORMALISED), EXPECTED)
    assert torch.equal(as_pixels(Image.fromarray(LEVELS[2])), EXPECTED[2:3])
    assert torch.equal(as_pixels(paths[1]), EXPECTED[1:2])


def test_where_channels_may_be_first_or_last_they_are_first() -> None:
    cube = torch.rand(2, 3, 4, 3)
    assert torch.equal(as_pixels(cube), cube)


def test_pictures_are_resized_as_kdx_explain_resizes_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(LEVELS[0]).resize((31, 18)).save(tmp_path / name / "1.png")
    paths = [image.path for image in list_images(tmp_path).images]
    expected = load_images(open_data(str(tmp_path)), [0, 1], (8, 10)).pixels
    size = InputFormat.of([Preprocessing((4, 4)), Preprocessing((8, 10))])
    assert torch.equal(as_pixels(paths, size), expected)
    assert InputFormat.of([Preprocessing((8, 10))], [(6, 6)]).size == (6, 6)  # a file takes no other size


def test_labels_of_a_loader_are_joined() -> None:
    labels = torch.tensor([4, 2, 2, 0])
    pixels, joined = labelled(DataLoader(TensorDataset(EXPECTED, labels), batch_size=3))
    assert torch.equal(pixels, EXPECTED) and joined == [4, 2, 2, 0]
    embedding = torch.rand(4, 7)
    assert torch.equal(labelled(DataLoader(TensorDataset(EXPECTED, embedding), batch_size=3))[1], embedding)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (EXPECTED * 255, "between 0 and 255, like 8-bit levels"),
        ((EXPECTED - 0.45) / 0.225, "as after a normalisation"),
        (EXPECTED * 2 - 1, "between -1 and 1, as after"),
        (EXPECTED * 65535, "not in [0, 1]"),
        ([EXPECTED[0] * 255], "8-bit levels"),
        (DataLoader(TensorDataset(EXPECTED * 2 - 1, torch.arange(4))), "as after a normalisation"),
    ],
)
def test_pixels_of_a_wrong_range_are_refused_where_kdx_normalises_them(images: Any, message: str) -> None:
    with pytest.raises(KdxError) as caught:
        as_pixels(images, NORMALISED)
    assert message in caught.value.problem and caught.value.hint
    for plain in (InputFormat(), InputFormat.of([Preprocessing((6, 5))])):  # the network normalises, or its user
        assert torch.isfinite(as_pixels(images, plain)).all()


def test_the_overshoot_of_a_bicubic_resize_is_accepted() -> None:
    checkers = torch.zeros(1, 3, 8, 8)
    checkers[..., ::2, ::2] = checkers[..., 1::2, 1::2] = 1
    large = torch.nn.functional.interpolate(checkers, size=(29, 29), mode="bicubic")
    assert float(large.max()) > 1.05
    assert torch.equal(as_pixels(large, NORMALISED), large)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (EXPECTED[:0], "have shape"),
        (EXPECTED[:, :1], "have shape [4, 1, 6, 5]"),
        (torch.from_numpy(LEVELS).int(), "type torch.int32"),
        ([], "no images"),
        ([EXPECTED[0], EXPECTED[0, :, 1:]], "several sizes, such as 5 x 5 and 6 x 5"),
        ([Image.fromarray(LEVELS[0]), Image.fromarray(LEVELS[0, 1:])], "several sizes"),
        ("no such file.jpg", "no image file no such file.jpg"),
        (".", "is a folder"),
        (iter([{"pixel_values": EXPECTED}]), "yields dict"),
        (iter([]), "no batches"),
        (iter([(EXPECTED, [0] * 4), (EXPECTED[..., 1:], [0] * 4)]), "images of 2 sizes"),
    ],
)
def test_what_are_no_images_is_refused(images: Any, message: str) -> None:
    with pytest.raises(KdxError) as caught:
        as_pixels(images)
    assert message in caught.value.problem and caught.value.hint


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(written(tmp_path)[0].read_bytes()[:60])
    with pytest.raises(KdxError, match=r"cut\.png cannot be read"):
        as_pixels([path])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_once(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(LEVELS[0]).save(path, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
        expected = torch.from_numpy(upright / np.float32(255)).permute(2, 0, 1)[None]
        torch.testing.assert_close(as_pixels(image), expected)
        torch.testing.assert_close(as_pixels(to_rgb(to_rgb(image))), expected)
    torch.testing.assert_close(as_pixels(path), expected)


def test_levels_become_the_nearest_pixels() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(3)
    expected = (levels.double() / 255).float()  # rounded twice; both roundings agree, because no quotient lies halfway between two numbers
    assert torch.equal(pixels_of(levels), expected)
    assert torch.equal(as_pixels(levels.view(1, 3, 16, 16)), expected.view(1, 3, 16, 16))
