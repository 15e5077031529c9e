"""Damaged images of every format that Pillow opens, and images of extreme sizes."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from kdx.data.dataset import open_data
from kdx.data.images import load_images
from tests.hostile.input_files import Call, fresh
from tests.hostile.mutations import damaged

FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "EPS", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "MSP", "PCX", "PDF", "PNG", "PPM", "QOI"),
    *("SGI", "SPIDER", "TGA", "TIFF", "WEBP", "XBM"),
)


@functools.cache
def images() -> dict[str, list[bytes]]:
    """Small images of every format and mode that Pillow can write."""
    rng = np.random.default_rng(0)
    contents: dict[str, list[bytes]] = {}
    for name in FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"):
            image = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).convert("L" if mode == "I;16" else mode)
            file = io.BytesIO()
            try:
                image.save(file, name)
            except (OSError, ValueError, KeyError):
                continue
            contents.setdefault(name, []).append(file.getvalue())
    return contents


def _png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG of zeros with this size; the file is small."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = 1 + (width * bits * {0: 1, 2: 3, 3: 1}[colour] + 7) // 8
    rows = zlib.compress(bytes(min(row * height, 200_000_000)), 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


_SIZES = ((1, 60_000), (60_000, 1), (2, 2_000_000), (13_000, 13_000), (9_000, 9_000), (100_000, 100_000), (1, 1), (65_535, 400))


def image(path: Path, random_: random.Random) -> Call:
    """A damaged image, or, one time in a hundred, one of an extreme size."""
    folder = fresh(path)
    formats = images()
    name = random_.choice(sorted(formats))
    content = random_.choice(formats[name])
    other = random_.choice(formats[random_.choice(sorted(formats))])
    content = _png(*random_.choice(_SIZES)) if random_.random() < 0.01 else damaged(content, random_, other)
    suffix = random_.choice((name.lower(), "png", "jpg", "tiff"))
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    (folder / "a" / f"1.{suffix if suffix != 'jpeg2000' else 'jp2'}").write_bytes(content)
    (folder / "b" / "2.png").write_bytes(formats["PNG"][0])

    def read() -> None:
        dataset = open_data(str(folder))
        load_images(dataset, range(len(dataset.ids)), (16, 16))

    return read
