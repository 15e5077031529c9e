"""Decoding of JPEG files on a GPU: which files nvJPEG decodes, and the resulting levels, with a stand-in for nvJPEG on the CPU."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kdx.choices import Interpolation, ResizeMode, Resizing
from kdx.data import gpu_decoder
from kdx.data.dataset import open_data
from kdx.data.gpu_decoder import GpuDecoder, fit_levels, open_gpu_decoder, upright
from kdx.data.images import decoded, load_images
from kdx.data.pixels import fit, turned
from kdx.errors import KdxError
from tests.data.pictures import picture

CPU = torch.device("cpu")


def levels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def smooth(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture without noise, which JPEG changes little."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


class Nvjpeg:
    """A stand-in for nvJPEG: Pillow without turning. A call with a file that contains ``refused`` fails as a whole."""

    def __init__(self, refused: bytes = b"REFUSED") -> None:
        self.refused = refused
        self.calls: list[int] = []

    def __call__(self, files: list[Tensor]) -> list[Tensor]:
        self.calls.append(len(files))
        contents = [file.numpy().tobytes() for file in files]
        if any(self.refused in content for content in contents):
            raise RuntimeError("nvjpegDecodeBatched failed: 5")
        images = [Image.open(io.BytesIO(content)) for content in contents]
        assert all(image.format == "JPEG" and image.mode == "RGB" and not image.info.get("progressive") for image in images)
        return [levels_of(image) for image in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of all kinds in the classes a and b. Those that nvJPEG takes are named baseline."""
    for name in "ab":
        (tmp_path / name).mkdir()
    smooth((40, 30)).save(tmp_path / "a" / "baseline.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth((37, 22), 1).save(tmp_path / "a" / "baseline-turned.jpg", quality=95, exif=exif)
    smooth((40, 30), 2).save(tmp_path / "a" / "progressive.jpg", progressive=True)
    smooth((40, 30), 3).convert("L").save(tmp_path / "a" / "grey.jpg")
    smooth((40, 30), 4).convert("CMYK").save(tmp_path / "b" / "cmyk.jpg")
    smooth((40, 30), 5).save(tmp_path / "b" / "rgb.jpg", keep_rgb=True)
    smooth((40, 30), 6).save(tmp_path / "b" / "picture.png")
    whole = io.BytesIO()
    smooth((400, 300), 7).save(whole, "JPEG", quality=95)
    (tmp_path / "b" / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "b" / "not an image.jpg").write_bytes(b"text")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_the_images_are_those_of_pillow(folder: Path, workers: int) -> None:
    dataset = open_data(str(folder))
    nvjpeg = Nvjpeg()
    on_gpu = replace(dataset, decoder=GpuDecoder(CPU, nvjpeg))
    batches = np.array_split(np.random.default_rng(0).permutation(len(dataset)), 2)
    with decoded(on_gpu, iter(batches), (16, 20), workers) as results:
        actual = list(results)
    expected = [load_images(dataset, batch, (16, 20)) for batch in batches]
    assert sum(nvjpeg.calls) == 2
    assert sum(len(images.unreadable) for images in expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.kept.tolist() == theirs.kept.tolist() and ours.unreadable == theirs.unreadable
        by_pillow = [index for index, image in enumerate(ours.kept) if "baseline" not in dataset.ids[image]]
        assert torch.equal(ours.pixels[by_pillow], theirs.pixels[by_pillow])
        assert (ours.pixels - theirs.pixels).abs().max() <= 1.01 / 255


def test_a_file_that_nvjpeg_refuses_is_left_to_pillow(folder: Path) -> None:
    smooth((40, 30), 8).save(folder / "a" / "refused.jpg", comment=b"REFUSED")
    dataset = open_data(str(folder))
    nvjpeg = Nvjpeg()
    images = load_images(replace(dataset, decoder=GpuDecoder(CPU, nvjpeg)), range(len(dataset)), (30, 40))
    expected = load_images(dataset, range(len(dataset)), (30, 40))
    assert nvjpeg.calls == [3, 1, 1, 1] and images.unreadable == expected.unreadable
    row = [dataset.ids[index] for index in images.kept].index("a/refused.jpg")
    assert torch.equal(images.pixels[row], expected.pixels[row])


def test_files_of_one_size_keep_every_level(tmp_path: Path) -> None:
    """Without a resize nothing is rounded, in any number of chunks."""
    for index in range(2 * gpu_decoder.CHUNK + 3):
        path = tmp_path / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        smooth((8, 8), index).save(path)
    dataset = open_data(str(tmp_path))
    nvjpeg = Nvjpeg()
    order = np.random.default_rng(1).permutation(len(dataset))
    images = load_images(replace(dataset, decoder=GpuDecoder(CPU, nvjpeg)), order, (8, 8))
    assert torch.equal(images.pixels, load_images(dataset, order, (8, 8)).pixels) and sorted(nvjpeg.calls) == [3, 32, 32]
    assert load_images(replace(dataset, decoder=GpuDecoder(CPU, nvjpeg)), [], (8, 8)).pixels.shape == (0, 3, 8, 8)


def test_images_that_share_a_file_are_left_to_pillow() -> None:
    dataset = open_data("digits")
    images = load_images(replace(dataset, decoder=GpuDecoder(CPU, Nvjpeg())), range(4), (8, 8))
    assert torch.equal(images.pixels, load_images(dataset, range(4), (8, 8)).pixels)


def test_very_large_files_are_refused_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a" / "large.jpg", size=(200, 200))
    picture(tmp_path / "b" / "small.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30000)
    dataset = replace(open_data(str(tmp_path)), decoder=GpuDecoder(CPU, Nvjpeg()))
    images = load_images(dataset, [0, 1], (8, 8))
    assert images.kept.tolist() == [1] and images.unreadable[0][1].startswith("DecompressionBomb")


@pytest.mark.parametrize("orientation", [*range(10), None, "x"])
def test_levels_are_turned_as_pictures_are(orientation: object) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    assert torch.equal(upright(levels_of(image), orientation), levels_of(turned(image, orientation)))


@pytest.mark.parametrize("mode", ["cover", "squash", "letterbox"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(16, 20), (90, 31), (50, 70), (1, 5)])
def test_levels_are_resized_as_pictures_are(mode: ResizeMode, interpolation: Interpolation, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    resizing = Resizing(mode, interpolation)
    actual, expected = fit_levels(levels_of(image), size, resizing), levels_of(fit(image, size, resizing))
    difference = (actual.int() - expected.int()).abs()
    assert actual.shape == expected.shape and actual.dtype == torch.uint8
    assert difference.max() <= 1 and difference.float().mean() < 0.02


# ---- opening ----


def torchvision(monkeypatch: pytest.MonkeyPatch, decode: Any) -> None:
    module = SimpleNamespace(ImageReadMode=SimpleNamespace(RGB="RGB"), decode_jpeg=decode)
    monkeypatch.setattr(gpu_decoder, "import_optional", lambda package, extra, purpose: module)


def test_opening_decodes_a_test_image(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, object]] = []

    def decode(files: list[Tensor], mode: object, device: object) -> list[Tensor]:
        calls.append((mode, device))
        return Nvjpeg()(files)

    torchvision(monkeypatch, decode)
    gpu = torch.device("cuda", 1)
    assert open_gpu_decoder(gpu).device == gpu and calls == [("RGB", gpu)]


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda files, mode, device: 1 / 0, "does not work here: division by zero"),
        (lambda files, mode: [], "does not work here"),
        (lambda files, mode, device: [torch.zeros(3, 32, 48, dtype=torch.uint8)], "is off by 15. grey levels"),
    ],
)
def test_a_decoder_that_does_not_work_is_refused(decode: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision(monkeypatch, decode)
    with pytest.raises(KdxError, match=message) as caught:
        open_gpu_decoder(torch.device("cuda"))
    assert "torchvision's CUDA build" in caught.value.hint
    with pytest.raises(KdxError, match="needs an NVIDIA GPU, and the device is cpu"):
        open_gpu_decoder(CPU)


@pytest.mark.gpu
def test_nvjpeg_differs_from_pillow_by_a_few_levels(folder: Path) -> None:
    try:
        decoder = open_gpu_decoder(torch.device("cuda"))
    except KdxError as error:
        pytest.skip(error.problem)
    dataset = open_data(str(folder))
    ours, theirs = (load_images(data, range(len(dataset)), (16, 20)) for data in (replace(dataset, decoder=decoder), dataset))
    assert ours.pixels.is_cuda and ours.unreadable == theirs.unreadable
    assert (ours.pixels.cpu() - theirs.pixels).abs().mean() < 1.5 / 255
