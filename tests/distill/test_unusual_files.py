"""Unusual and damaged image files: training and explaining see the same pixels, and leave out the same images."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kdx.data import Dataset, open_data
from kdx.data.images import decoded
from kdx.distill import EpochResult, TrainingSettings, distill
from kdx.distill import data as training_data
from kdx.distill.data import SplitImages

_SIZE = (16, 16)
_LEFT, _RIGHT = (255, 0, 0), (0, 0, 255)


def _halves(left: Any = _LEFT, right: Any = _RIGHT, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, _SIZE, left)
    image.paste(right, (8, 0, 16, 16))
    return image


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def _turned(orientation: int) -> bytes:
    """The halves with an orientation in the EXIF data, such that the upright image is the halves."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    return _saved(_halves().transpose(undo), "PNG", exif=exif)


def _rgb16() -> bytes:
    """A PNG file with 16 bits per channel, which Pillow does not write."""
    rows = b"".join(
        b"\0" + b"".join(struct.pack(">3H", *(level * 257 for level in (_LEFT if x < 8 else _RIGHT))) for x in range(16)) for _ in range(16)
    )

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", 16, 16, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


_COLOURS = {
    "rgb.png": _saved(_halves(), "PNG"),
    "cmyk.jpg": _saved(_halves().convert("CMYK"), "JPEG", quality=100, subsampling=0),
    "cmyk.tif": _saved(_halves().convert("CMYK"), "TIFF"),
    "palette.gif": _saved(_halves().convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
    "transparent.png": _saved(_halves((255, 0, 0, 255), (0, 0, 255, 255), "RGBA"), "PNG"),
    "deep.png": _rgb16(),
    **{f"turned{orientation}.png": _turned(orientation) for orientation in (3, 6, 8)},
    "animated.gif": _saved(_halves(), "GIF", save_all=True, append_images=[_noise(), _noise()]),
    "animated.webp": _saved(_halves(), "WEBP", save_all=True, append_images=[_noise()], lossless=True),
}
"""Files whose image is red on the left and blue on the right."""

_GREYS = {
    "grey.png": _saved(_halves(51, 204, "L"), "PNG"),
    "grey.jpg": _saved(_halves(51, 204, "L"), "JPEG", quality=100),
    "grey16.png": _saved(Image.fromarray(np.repeat(np.array([[51 * 257, 204 * 257]], np.uint16), 8, axis=1).repeat(16, axis=0)), "PNG"),
    "grey16.tif": _saved(Image.fromarray(np.repeat(np.array([[51 * 257, 204 * 257]], np.uint16), 8, axis=1).repeat(16, axis=0)), "TIFF"),
    "clear.png": _saved(_halves((0, 0, 0, 204), (0, 0, 0, 51), "RGBA"), "PNG"),
}
"""Files whose image is dark grey (51) on the left and light grey (204) on the right."""

_UNREADABLE = {
    "empty.jpg": b"",
    "text.png": b"not an image",
    "truncated.png": _saved(_noise(), "PNG")[:300],
    "truncated.jpg": _saved(_noise(), "JPEG")[:500],
    "damaged.png": _saved(_noise(), "PNG").replace(b"IDAT", b"IDAX"),
    "beginning.gif": _saved(_noise(), "GIF")[:20],
}

_FILES = {name: files[name] for files in (_COLOURS, _GREYS, _UNREADABLE) for name in files}


def _folder(root: Path) -> str:
    for name, content in _FILES.items():
        path = root / ("grey" if name in _GREYS else "other") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return str(root)


def _table(root: Path) -> str:
    _folder(root)
    rows = [f"{folder}/{name},{folder}" for name in _FILES for folder in ("grey" if name in _GREYS else "other",)]
    (root / "labels.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    return str(root / "labels.csv")


def _hugging_face(root: Path) -> str:
    entries = {
        "image": [{"bytes": content, "path": None} for content in _FILES.values()],
        "label": [int(name in _GREYS) for name in _FILES],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["other", "grey"])})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(entries, features=features).save_to_disk(root / "x")
    return f"hfdata:{root / 'x'}"


def _explained(dataset: Dataset) -> tuple[torch.Tensor, NDArray[np.int64], set[str]]:
    """Pixels, indices and unreadable images as `kdx explain` reads them."""
    with decoded(dataset, [np.arange(len(dataset))[:9], np.arange(len(dataset))[9:]], _SIZE) as batches:
        images = list(batches)
    unreadable = {name for part in images for name, _ in part.unreadable}
    return torch.cat([part.pixels for part in images]), np.concatenate([part.kept for part in images]), unreadable


def _trained(dataset: Dataset) -> tuple[torch.Tensor, NDArray[np.int64], set[str]]:
    """The same as `kdx distill` reads them."""
    images = SplitImages(dataset, np.arange(len(dataset)), _SIZE, limit=1)
    pixels, labels, kept = images.read(np.arange(len(images)))
    assert torch.equal(labels, torch.from_numpy(dataset.labels[images.indices[kept]]))
    return pixels, images.indices[kept], set(images.unreadable)


def _trained_without_cache(dataset: Dataset) -> tuple[torch.Tensor, NDArray[np.int64], set[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data, "CACHE_BYTES", 0)
        return _trained(dataset)


@pytest.mark.parametrize("source", [_folder, _table, _hugging_face])
@pytest.mark.parametrize("read", [_explained, _trained, _trained_without_cache])
def test_training_and_explaining_read_the_same(
    tmp_path: Path,
    source: Callable[[Path], str],
    read: Callable[[Dataset], tuple[torch.Tensor, NDArray[np.int64], set[str]]],
) -> None:
    dataset = open_data(source(tmp_path))
    names = list(_FILES) if source is _hugging_face else [Path(name).name for name in dataset.ids]
    pixels, kept, unreadable = read(dataset)
    assert {names[dataset.ids.index(name)] for name in unreadable} == set(_UNREADABLE)
    assert sorted(names[index] for index in kept) == sorted([*_COLOURS, *_GREYS])
    for image, index in zip(pixels, kept, strict=True):
        left, right = (_LEFT, _RIGHT) if names[index] in _COLOURS else ((51,) * 3, (204,) * 3)
        tolerance = 4 if names[index].endswith(".jpg") else 0.01
        for half, colour in ((image[..., :8], left), (image[..., 8:], right)):
            levels = half.permute(1, 2, 0).numpy() * 255
            assert np.abs(levels - np.array(colour)).max() <= tolerance, names[index]


@pytest.mark.parametrize(("method", "batch", "accumulate"), [pytest.param("ofd", 2, 1, marks=pytest.mark.slow), ("kd", 8, 4)])
def test_batches_without_a_readable_image_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, batch: int, accumulate: int
) -> None:
    """The first images of a split that is not kept in memory, by which shapes are found, and all images of a part of a batch."""
    monkeypatch.setattr(training_data, "CACHE_BYTES", 0)
    noise, rows = np.random.default_rng(0), ["path,label,split"]
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        for number in range(count):
            name = f"{split}{number:02d}.png"
            image = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            (tmp_path / name).write_bytes(b"" if split == "train" and number < 8 else _saved(image, "PNG"))
            rows.append(f"{name},{'ab'[number % 2]},{split}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    settings = TrainingSettings(
        method=method, epochs=2, batch=batch, accumulate=accumulate, learning_rate=0.01, augment=True, image_size=(8, 8), max_unreadable=0.5
    )
    for name, chosen in (("shifted", settings), ("stored", replace(settings, augment=False))):
        results: list[EpochResult] = []
        distill(
            str(tmp_path / "labels.csv"),
            teacher="kdx:resnet,width=4,depth=1",
            student="kdx:resnet,width=4,depth=1",
            out=tmp_path / name,
            settings=chosen,
            device="cpu",
            report=results.append,
        )
        assert len(results) == 6 and all(result.loss is not None and np.isfinite(result.loss) for result in results)
