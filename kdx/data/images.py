"""Decoding of images into tensors, one batch at a time or prefetched by threads."""

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

from kdx import threads
from kdx.data.dataset import Dataset, Indices
from kdx.data.pixels import fit
from kdx.data.prefetch import Job, prefetch
from kdx.errors import KdxError, printable


@dataclass(frozen=True)
class Images:
    """Decoded images: ``pixels`` [n, 3, H, W] float32 in [0, 1], their indices ``kept``, and (id, reason) of each unreadable image."""

    pixels: Tensor
    kept: Indices
    unreadable: tuple[tuple[str, str], ...]


def load_images(dataset: Dataset, indices: Sequence[int] | Indices, size: tuple[int, int]) -> Images:
    """Decode images, in order, as RGB, brought to ``size`` = (height, width) as ``dataset.resizing`` states.

    An image that is corrupt, truncated or too large to be safe (PIL's decompression bomb limit) raises no error. It is left out
    and listed in ``unreadable`` with the reason.
    """
    with decoded(dataset, [np.asarray(indices, dtype=np.int64)], size) as batches:
        return next(batches)


def load_references(dataset: Dataset, indices: Sequence[int] | Indices, size: tuple[int, int]) -> Tensor:
    """The pixels of `load_images` of reference images. Raises KdxError if one of them cannot be read."""
    images = load_images(dataset, indices, size)
    if images.unreadable:
        name, reason = images.unreadable[0]
        raise KdxError(
            f"The reference image {name} cannot be read ({reason}).",
            "Repair or remove it, or choose other reference images with another --seed.",
        )
    return images.pixels


def check_unreadable(unreadable: Sequence[tuple[str, str]], total: int, limit: float) -> None:
    """KdxError if more images are unreadable than the share ``limit`` of ``total`` allows; one always may be, unless the limit is 0."""
    if len(unreadable) > (max(1, limit * total) if limit else 0):
        name, reason = unreadable[0]
        raise KdxError(
            f"{len(unreadable)} of {total} images cannot be read, the first being {name} ({reason}).",
            "Repair or remove them, or allow more with --max-unreadable.",
        )


@contextmanager
def decoded(dataset: Dataset, batches: Iterable[Indices], size: tuple[int, int], workers: int | None = None) -> Iterator[Iterator[Images]]:
    """`load_images` of each batch, in order, decoded by ``workers`` threads while earlier batches are in use.

    At most `kdx.data.prefetch.PREFETCH_DEPTH` batches are decoded in advance. By default there is one thread per core; with 0, each
    batch is decoded when it is taken. The pixels are the same for any number of threads: Pillow decodes and resizes without the
    interpreter's lock, and each image is written to its own row.

    With ``dataset.decoder``, JPEG files are decoded on a GPU, and the pixels are there.
    """
    # Warning filters apply to all threads, so they are set once here. PIL's warnings about unusual files do not help a user.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.|kdx\.data")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        count = threads.available_cores() if workers is None else workers
        with prefetch((_job(dataset, batch, size) for batch in batches), count) as results:
            yield results


def _job(dataset: Dataset, indices: Indices, size: tuple[int, int]) -> Job[Images]:
    """One task per image, which fills its row of the pixels or records why it cannot; with a decoder on a GPU, its own tasks."""
    if dataset.decoder is not None:
        decoding = dataset.decoder.job(dataset, indices, size)
        return Job(decoding.tasks, lambda: _decoded_on_gpu(dataset, indices, *decoding.result()))
    pixels = torch.empty(len(indices), 3, *size)
    reasons: list[str] = [""] * len(indices)

    def decode(row: int) -> None:
        try:
            levels = np.asarray(fit(dataset.read(int(indices[row])), size, dataset.resizing))  # [H, W, 3]
        except Exception as error:  # decoders raise SyntaxError, struct.error, MemoryError and more on damaged files
            reasons[row] = printable(f"{type(error).__name__}: {error}")
        else:
            np.divide(levels.transpose(2, 0, 1), np.float32(255), out=pixels[row].numpy())

    def result() -> Images:
        failed = np.array([bool(reason) for reason in reasons], dtype=bool)
        unreadable = tuple((dataset.ids[index], reason) for index, reason in zip(indices, reasons, strict=True) if reason)
        return Images(pixels[torch.from_numpy(~failed)] if unreadable else pixels, indices[~failed], unreadable)

    return Job([partial(decode, row) for row in range(len(indices))], result)


def _decoded_on_gpu(dataset: Dataset, indices: Indices, levels: Tensor, reasons: list[str]) -> Images:
    """The images of a `kdx.data.gpu_decoder.GpuDecoder`."""
    failed = np.array([bool(reason) for reason in reasons], dtype=bool)
    unreadable = tuple((dataset.ids[index], reason) for index, reason in zip(indices, reasons, strict=True) if reason)
    kept = levels[torch.from_numpy(~failed).to(levels.device)] if unreadable else levels
    # A division by a number would be a product with its rounded inverse on a GPU.
    return Images(kept.float().div_(torch.full((), 255.0, device=levels.device)), indices[~failed], unreadable)
