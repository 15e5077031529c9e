"""Converts what users pass as images into pixels [n, 3, h, w]: arrays, Pillow images, files, and data loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdx.choices import COVER, Resizing
from kdx.data.pixels import fit, pixels_of, to_rgb
from kdx.errors import KdxError, printable
from kdx.export.graphs import Preprocessing
from kdx.features import arrays
from kdx.features.arrays import Array

Picture = Image.Image | str | Path
Pictures = Picture | Sequence[Picture | Array]
"""Images that are not one array: Pillow images, paths of image files, or a list of these and of single images [3, h, w] or [h, w, 3]."""

Batches = Iterable[Sequence[Any]]
"""A PyTorch ``DataLoader``, or any other iterable that yields (images, labels)."""

_TOLERANCE = 0.25
"""How far pixels may lie outside [0, 1]: a bicubic resize overshoots at edges."""

_GIVE = (
    "Give at least one image: RGB as floating-point numbers in [0, 1] or as uint8, [n, 3, height, width] or [n, height, width, 3]; "
    "or Pillow images, or paths."
)


@dataclass(frozen=True)
class InputFormat:
    """The images that a set of networks takes.

    size: the (height, width) to which Pillow images and files are resized; None if no network specifies one. unit_range: whether pixels
    must be in [0, 1], because kdx normalises them for a network. resizing: how Pillow images and files are brought to the size.
    """

    size: tuple[int, int] | None = None
    unit_range: bool = False
    resizing: Resizing = COVER

    @classmethod
    def of(
        cls, preprocessing: Iterable[Preprocessing], file_sizes: Iterable[tuple[int, int] | None] = (), resizing: Resizing = COVER
    ) -> Self:
        """The format for networks with these preprocessings. file_sizes: the only size that an exported file takes, or None."""
        steps = list(preprocessing)
        fixed = [size for size in file_sizes if size is not None]
        sizes = fixed or [step.size for step in steps if step.size is not None]
        largest = max(sizes, key=lambda size: size[0] * size[1], default=None)
        return cls(largest, any({*step.mean} != {0.0} or {*step.std} != {1.0} for step in steps), resizing)


def as_pixels(images: Any, expected: InputFormat = InputFormat()) -> Tensor:
    """Images as a floating-point tensor [n, 3, h, w], n >= 1.

    images: an array or tensor, floating-point or uint8 (level v becomes v / 255), with the channels first or last; if both could be meant,
    they are first. Or a Pillow image, the path of a file, or a list of them. These are made RGB and upright, and brought to
    ``expected.size`` with ``expected.resizing`` (by default they cover it, bicubic and antialiased, and are cropped at the centre), as in
    `kdx explain`; without a size they keep their own, which must be equal. Or an iterable of batches, whose images are joined.

    Raises KdxError for anything else, for a file that cannot be read, and for pixels outside [0, 1] where ``expected`` does not allow
    them.
    """
    pixels = labelled(images, expected)[0] if _yields_batches(images) else _batch(images, expected)
    if isinstance(images, Tensor) and images.dtype == torch.uint8:  # levels are always within the range, and on a GPU the check would wait
        return pixels
    return _checked(pixels, expected)


def labelled(batches: Batches, expected: InputFormat = InputFormat()) -> tuple[Tensor, Any]:
    """All images [n, 3, h, w] and labels [n] or [n, e] of an iterable of batches (images, labels). Raises KdxError for other batches."""
    images: list[Tensor] = []
    labels: list[Any] = []
    for batch in batches:
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) < 2:
            raise KdxError(
                f"The data loader yields {type(batch).__name__}, not (images, labels).", "Give images and labels as two arrays instead."
            )
        images.append(_checked(_batch(batch[0], expected), expected))
        labels += list(batch[1])
    sizes = {tuple(part.shape[2:]) for part in images}
    if len(sizes) != 1:
        raise KdxError(
            "The data loader yields no batches." if not sizes else f"The data loader yields images of {len(sizes)} sizes.",
            "Check its data set, and resize all images to one size.",
        )
    embedding = isinstance(labels[0], Tensor) and labels[0].ndim > 0
    return torch.cat(images), torch.stack(labels) if embedding else [_plain(label) for label in labels]


def has_labels(images: Any) -> bool:
    """Whether ``images`` also contains the labels: whether it is a data loader."""
    return _yields_batches(images)


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, Tensor) else label


def _yields_batches(images: Any) -> bool:
    return isinstance(images, Iterable) and not isinstance(images, Tensor | np.ndarray | str | Path | Image.Image | Sequence | Mapping)


def _batch(images: Any, expected: InputFormat) -> Tensor:
    if isinstance(images, Image.Image | str | Path):
        images = [images]
    if isinstance(images, Sequence):
        return _stacked([_single(image, expected) for image in images])
    return _channels_first(arrays.tensor(images, "images"))


def _stacked(images: Sequence[Tensor]) -> Tensor:
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        shown = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
        raise KdxError(f"The images have several sizes, such as {shown}.", "Resize them, or give networks that specify an image size.")
    if not images:
        raise KdxError("There are no images.", _GIVE)
    return torch.stack([image.to(images[0]) for image in images])


def _single(image: Any, expected: InputFormat) -> Tensor:
    """One image of a list as [3, h, w]."""
    if isinstance(image, str | Path | Image.Image):
        rgb = to_rgb(image.copy()) if isinstance(image, Image.Image) else read_picture(Path(image))
        levels = np.asarray(rgb if expected.size is None else fit(rgb, expected.size, expected.resizing))
        return torch.from_numpy(np.divide(levels.transpose(2, 0, 1), np.float32(255)))
    return _channels_first(arrays.tensor(image, "images")[None])[0]


def read_picture(path: Path) -> Image.Image:
    """The image in a file, upright and in RGB. Raises KdxError if it cannot be read."""
    if path.is_dir():
        raise KdxError(f"{path} is a folder, not an image file.", "Give paths of images; kdx explain takes folders of class folders.")
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise KdxError(f"There is no image file {path}.", "Check the path.") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, MemoryError and more on damaged files
        reason = printable(f"{type(error).__name__}: {error}")
        raise KdxError(f"The image {path} cannot be read ({reason}).", "Repair it, or convert it to PNG.") from error


def _channels_first(batch: Tensor) -> Tensor:
    """An array of images as floating-point [n, 3, h, w]."""
    if batch.ndim == 4 and batch.shape[1] != 3 and batch.shape[3] == 3:
        batch = batch.permute(0, 3, 1, 2)
    if batch.ndim != 4 or batch.shape[1] != 3 or 0 in batch.shape or not (batch.is_floating_point() or batch.dtype == torch.uint8):
        raise KdxError(f"The images have shape {list(batch.shape)} and type {batch.dtype}.", _GIVE)
    return pixels_of(batch) if batch.dtype == torch.uint8 else batch


def _checked(batch: Tensor, expected: InputFormat) -> Tensor:
    """The same images. KdxError if they must be in [0, 1] and are far outside. NaN and infinity are left to the features' own check."""
    if not expected.unit_range:
        return batch
    low, high = (float(value) for value in torch.aminmax(batch))
    if not (low < -_TOLERANCE or high > 1 + _TOLERANCE) or not np.isfinite([low, high]).all():
        return batch
    seen = f"The pixels are between {low:.4g} and {high:.4g}"
    if low >= -64 and 5 < high <= 320:
        raise KdxError(f"{seen}, like 8-bit levels.", "Divide them by 255, or give them as uint8.")
    if low >= -5 and high <= 5:
        raise KdxError(f"{seen}, as after a normalisation.", "Give pixels in [0, 1] without normalisation: kdx applies each network's own.")
    raise KdxError(f"{seen}, not in [0, 1].", "Give floating-point pixels in [0, 1], or 8-bit levels as uint8.")
