"""Decoding of images into tensors, one batch at a time or prefetched by threads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdx import threads
from kdx.data import decoding_processes
from kdx.data.dataset import Dataset, Indices
from kdx.data.decoding_processes import Decode
from kdx.data.pixels import pixels_of
from kdx.data.prefetch import PREFETCH_DEPTH, Job, prefetch
from kdx.disk import log
from kdx.errors import KdxError, printable

if TYPE_CHECKING:
    from kdx.data.gpu_decoder import GpuDecoder

_CPU = torch.device("cpu")

_DEPTH_FOR_GPU = 4
"""The number of batches that are decoded in advance for a GPU, so that many processes have tasks."""


@dataclass(frozen=True, eq=False)
class Images:
    """Decoded images.

    rows [m, 3, H, W] uint8: the levels of every requested image, zeros if it is unreadable. readable [m]: which images were read. kept [n]:
    the indices of those. unreadable: (id, reason) of each other image.
    """

    rows: Tensor
    readable: NDArray[np.bool_]
    kept: Indices
    unreadable: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, dataset: Dataset, indices: Indices, rows: Tensor, reasons: Sequence[str]) -> Self:
        """The images of ``indices`` [m], from their levels and the reasons why they cannot be read ("" for readable images)."""
        readable = np.array([not reason for reason in reasons], dtype=bool)
        unreadable = tuple((dataset.ids[index], reason) for index, reason in zip(indices, reasons, strict=True) if reason)
        return cls(rows, readable, indices[readable], unreadable)

    @property
    def levels(self) -> Tensor:
        """The levels [n, 3, H, W] uint8 of the images that were read, from 0 to 255."""
        return self.rows[torch.from_numpy(self.readable).to(self.rows.device)] if self.unreadable else self.rows

    @cached_property
    def pixels(self) -> Tensor:
        """The same as float32 in [0, 1]."""
        return pixels_of(self.levels)


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
def decoded(
    dataset: Dataset,
    batches: Iterable[Indices],
    size: tuple[int, int],
    workers: int | None = None,
    device: torch.device = _CPU,
) -> Iterator[Iterator[Images]]:
    """`load_images` of each batch, in order, decoded by ``workers`` threads while earlier batches are in use.

    A few batches are decoded in advance. By default there is one thread per core; with 0, each batch is decoded when it is taken. The
    levels are the same for any number of threads: Pillow decodes and resizes without the interpreter's lock, and each image is written to
    its own row.

    device: where the networks run. For a GPU the levels are in pinned memory, and image files are decoded by as many processes. With
    ``dataset.decoder``, JPEG files are decoded on a GPU, and the levels are there.
    """
    on_gpu = device.type == "cuda"
    # Warning filters apply to all threads, so they are set once here. PIL's warnings about unusual files do not help a user.
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.|kdx\.data")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", r"This process .* is multi-threaded", DeprecationWarning)
        count = threads.available_cores() if workers is None else workers
        if dataset.decoder is not None:
            jobs = (_job_on_gpu(dataset.decoder, dataset, batch, size) for batch in batches)
        else:
            decode: Decode = partial(_decode, dataset, size)
            images = 1
            if on_gpu and count > 1 and decoding_processes.available() and dataset.has_file_per_image:
                try:
                    decode, images = stack.enter_context(decoding_processes.started(decode, size, count)), decoding_processes.IMAGES
                except OSError as error:  # the system limits processes, or their memory; threads decode the same levels
                    log.warning("Images are decoded by threads, which is slower: no process can be started (%s).", error.strerror or error)
            jobs = (_job(dataset, batch, size, decode, images, on_gpu) for batch in batches)
        yield stack.enter_context(prefetch(jobs, count, _DEPTH_FOR_GPU if on_gpu else PREFETCH_DEPTH))


def _job(dataset: Dataset, indices: Indices, size: tuple[int, int], decode: Decode, images: int, pinned: bool) -> Job[Images]:
    """Tasks of ``images`` images each, which fill their rows of the levels, or record why they cannot."""
    rows = _empty_rows((len(indices), 3, *size), pinned)
    levels = rows.numpy()
    reasons = [""] * len(indices)

    def fill(part: slice) -> None:
        reasons[part] = decode(indices[part], levels[part])

    parts = [slice(start, start + images) for start in range(0, len(indices), images)]
    return Job([partial(fill, part) for part in parts], lambda: Images.of(dataset, indices, rows, reasons))


def _job_on_gpu(decoder: GpuDecoder, dataset: Dataset, indices: Indices, size: tuple[int, int]) -> Job[Images]:
    decoding = decoder.job(dataset, indices, size)
    return Job(decoding.tasks, lambda: Images.of(dataset, indices, *decoding.result()))


def _empty_rows(shape: tuple[int, ...], pinned: bool) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)


def _decode(dataset: Dataset, size: tuple[int, int], indices: Indices, levels: NDArray[np.uint8]) -> list[str]:
    """Fill the levels [k, 3, H, W] of images. Returns for each image the reason if it cannot be read (its levels are then 0), else ""."""
    reasons = []
    for index, row in zip(indices, levels, strict=True):
        try:
            row[:] = np.asarray(dataset.read_fitted(int(index), size)).transpose(2, 0, 1)
        except KdxError:  # a service that cannot be reached does not make an image unreadable
            raise
        except Exception as error:  # decoders raise SyntaxError, struct.error, MemoryError and more on damaged files
            row[:] = 0
            reasons.append(printable(f"{type(error).__name__}: {error}"))
        else:
            reasons.append("")
    return reasons
