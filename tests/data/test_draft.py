"""JPEG files that are decoded at a fraction of their size: the difference from decoding at full size, and cases without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from kdx.choices import Resizing
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import load_images
from kdx.data.pixels import draft, scaled_size
from kdx.runs.plan import Plan
from kdx.runs.run import _recorded_options
from tests.runs.small_run import OPTIONS

SIZE = (427, 640)
"""The height and width of the photographs."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs as JPEG files (quality 92, upright and turned by EXIF) and as a PNG file."""
    folder = tmp_path_factory.mktemp("photographs")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, levels in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        image = Image.fromarray(levels)
        image.save(folder / name / "a.jpg", quality=92)
        image.transpose(Image.Transpose.ROTATE_90).save(folder / name / "b.jpg", quality=92, exif=exif)
        image.save(folder / name / "c.png")
    return folder


def levels_of(dataset: Dataset, size: tuple[int, int], **changes: object) -> NDArray[np.int64]:
    """The levels [6, 3, H, W] of all images."""
    images = load_images(replace(dataset, **changes), range(len(dataset)), size)  # type: ignore[arg-type]
    assert not images.unreadable
    return images.levels.numpy().astype(np.int64)


@pytest.mark.parametrize(("size", "mean", "largest"), [((100, 100), 0.9, 16), ((50, 50), 0.9, 16), ((26, 26), 0.9, 20)])
@pytest.mark.parametrize("mode", ["cover", "letterbox", "squash"])
def test_photographs_differ_by_little(photographs: Path, size: tuple[int, int], mean: float, largest: int, mode: str) -> None:
    dataset = replace(open_data(str(photographs)), resizing=Resizing(mode))  # type: ignore[arg-type]
    difference = abs(levels_of(dataset, size, draft=True) - levels_of(dataset, size))
    png = [name.endswith(".png") for name in dataset.ids]
    assert not difference[np.array(png)].any()
    jpeg = difference[~np.array(png)]
    assert 0 < jpeg.mean() < mean and jpeg.max() <= largest
    assert (jpeg.reshape(4, -1).max(1) > 0).all()  # also of the turned files


@pytest.mark.parametrize("size", [SIZE, (300, 400), (108, 161)])
def test_nothing_changes_below_four_times_the_size(photographs: Path, size: tuple[int, int]) -> None:
    dataset = open_data(str(photographs))
    np.testing.assert_array_equal(levels_of(dataset, size, draft=True), levels_of(dataset, size))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("mode", ["cover", "letterbox", "squash"])
def test_the_decoded_size_is_the_smallest_that_is_twice_as_large_as_needed(orientation: int, mode: str, tmp_path: Path) -> None:
    exif, resizing = Image.Exif(), Resizing(mode)  # type: ignore[arg-type]
    exif[0x0112] = orientation
    generator = np.random.default_rng(orientation)
    for width, height, h, w in generator.integers((40, 40, 2, 2), (300, 300, 40, 40), (40, 4)).tolist():
        Image.new("RGB", (width, height)).save(tmp_path / "image.jpg", exif=exif)
        with Image.open(tmp_path / "image.jpg") as image:
            draft(image, (h, w), resizing)
            decoded = image.size[::-1] if orientation == 6 else image.size
        whole = (height, width) if orientation == 6 else (width, height)
        needed = [2 * side for side in scaled_size(whole, (h, w), resizing)]
        factors = [8, 4, 2, 1]
        expected = next(
            factor for factor in factors if factor == 1 or all(own // need >= factor for own, need in zip(whole, needed, strict=True))
        )
        assert decoded == tuple(-(-side // expected) for side in whole)


def test_a_run_records_the_decoder(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(
        'student = "kdx:resnet,width=2,depth=1,stages=1,classes=2"\nlayers = ["layer1"]\nclasses = ["china", "flower"]\n'
    )
    for decoder, recorded in (("pillow", None), ("pillow-draft", "pillow-draft")):
        options = replace(OPTIONS, decoder=decoder)  # type: ignore[arg-type]
        assert Plan.of(str(photographs), tmp_path / "models.toml", (), options).dataset.draft == (recorded is not None)
        assert _recorded_options(options).get("decoder") == recorded
