"""Decoded images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdx.data.dataset import Dataset, Indices
from kdx.data.prefetch import Job, ahead, cores


@dataclass(frozen=True)
class Images:
    """Decoded images: ``pixels`` [n, 3, H, W] float32 in [0, 1], the indices that were kept, and what could not be read, and why."""

    pixels: Tensor
    kept: Indices
    unreadable: tuple[tuple[str, str], ...]


def load_images(dataset: Dataset, indices: Sequence[int] | Indices, size: tuple[int, int]) -> Images:
    """Decode images, in order: RGB, shorter side resized (bicubic, antialiased) to cover ``size`` = (height, width), centre crop.

    An image that is corrupt, truncated or too large to be safe (PIL's decompression bomb limit) is left out and named in
    ``unreadable`` with the reason; nothing is raised for it.
    """
    with decoded(dataset, [np.asarray(indices, dtype=np.int64)], size) as found:
        return next(found)


@contextmanager
def decoded(dataset: Dataset, batches: Iterable[Indices], size: tuple[int, int], workers: int | None = None) -> Iterator[Iterator[Images]]:
    """`load_images` of each batch, in order, decoded by ``workers`` threads while those before are in use.

    No more than `kdx.prefetch.AHEAD` batches are held beyond the one that was taken. By default there is a thread a core; with 0 each
    batch is decoded when it is asked for. The pixels are the same for any number: Pillow decodes and resizes without the interpreter's
    lock, and each image is written to its own place.
    """
    # Filters hold for all threads, so they are set here and not in each; PIL's remarks on odd files are of no use to a user.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.|kdx\.data")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with ahead((_job(dataset, batch, size) for batch in batches), cores() if workers is None else workers) as results:
            yield results


def _job(dataset: Dataset, indices: Indices, size: tuple[int, int]) -> Job[Images]:
    """A part an image, which fills its row of the pixels or says why it cannot."""
    pixels = torch.empty(len(indices), 3, *size)
    reasons: list[str] = [""] * len(indices)

    def decode(row: int) -> None:
        try:
            levels = np.asarray(fit(dataset.read(int(indices[row])), size))  # [H, W, 3]
        except Exception as error:  # decoders raise SyntaxError, struct.error, MemoryError and more on damaged files
            reasons[row] = f"{type(error).__name__}: {error}"
        else:
            np.divide(levels.transpose(2, 0, 1), np.float32(255), out=pixels[row].numpy())

    def result() -> Images:
        bad = np.array([bool(reason) for reason in reasons], dtype=bool)
        unreadable = tuple((dataset.ids[index], reason) for index, reason in zip(indices, reasons, strict=True) if reason)
        return Images(pixels[torch.from_numpy(~bad)] if unreadable else pixels, indices[~bad], unreadable)

    return Job([partial(decode, row) for row in range(len(indices))], result)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` resized (bicubic, antialiased) so that it just covers ``size`` = (height, width), then cropped at its centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image if covering == image.size else image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))
