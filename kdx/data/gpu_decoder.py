"""Decoding of JPEG files on a GPU (`--decoder torchvision-cuda`): nvJPEG through torchvision, and Pillow for every other file.

Pillow reads the header of each file. nvJPEG decodes complete baseline files in YCbCr colours. Pillow decodes the others (progressive, grey,
CMYK or RGB JPEGs, other formats, incomplete and very large files) and those that nvJPEG refuses, so that the same images are readable with
both. The images from nvJPEG are turned upright and resized on the GPU.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from kdx.choices import COVER, Resizing
from kdx.data.labelled_images import Dataset, Indices
from kdx.data.pixels import BAR, fit, orientation_of
from kdx.data.prefetch import Job
from kdx.errors import KdxError, first_line, import_optional, printable

Decode = Callable[[list[Tensor]], Sequence[Tensor]]
"""Decodes JPEG files, each a tensor of bytes on the CPU, into levels [3, h, w] uint8 on the device."""

CHUNK = 32
"""Files per call of nvJPEG, and per task of a thread."""

_END = b"\xff\xd9"
"""The marker at the end of a JPEG file. Pillow refuses a file that ends before it, and nvJPEG may fill the rest with grey."""

_PADDING = 64
"""The largest number of bytes after the end marker, which some cameras write."""


@dataclass(frozen=True, eq=False)
class GpuDecoder:
    """Decodes JPEG files on ``device`` with ``decode``, on a stream of its own."""

    device: torch.device
    decode: Decode = field(repr=False)

    def job(self, dataset: Dataset, indices: Indices, size: tuple[int, int]) -> Job[tuple[Tensor, list[str]]]:
        """Tasks that decode images of ``dataset``. The result is the levels [n, 3, H, W] uint8 on the device, and for each image
        the reason if it cannot be read (its levels are then 0), else ""."""
        parts = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
        levels: list[Tensor] = [torch.empty(0)] * len(parts)
        reasons: list[list[str]] = [[]] * len(parts)

        def fill(number: int) -> None:
            # Each thread has a stream, so that it waits only for its own work and not for the networks.
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                levels[number], reasons[number] = self._chunk(dataset, parts[number], size)
            if stream is not None:
                stream.synchronize()

        def result() -> tuple[Tensor, list[str]]:
            if self.device.type == "cuda":
                for part in levels:
                    part.record_stream(torch.cuda.current_stream(self.device))
            whole = torch.cat(levels) if levels else torch.empty(0, 3, *size, dtype=torch.uint8, device=self.device)
            return whole, [reason for part in reasons for reason in part]

        return Job([partial(fill, number) for number in range(len(parts))], result)

    def _chunk(self, dataset: Dataset, indices: Indices, size: tuple[int, int]) -> tuple[Tensor, list[str]]:
        rows = torch.zeros(len(indices), 3, *size, dtype=torch.uint8, device=self.device)
        reasons = [""] * len(indices)
        files = [jpeg_of(dataset, int(index)) for index in indices]
        decoded = self._decoded([file.data for file in files if file is not None])
        for row, (index, file) in enumerate(zip(indices, files, strict=True)):
            image = None if file is None else next(decoded)
            if file is not None and image is not None:
                rows[row] = fit_levels(upright(image, file.orientation), size, dataset.resizing)
                continue
            try:
                levels = np.asarray(fit(dataset.read(int(index)), size, dataset.resizing)).transpose(2, 0, 1)
            except Exception as error:  # decoders raise SyntaxError, struct.error, MemoryError and more on damaged files
                reasons[row] = printable(f"{type(error).__name__}: {error}")
            else:
                rows[row] = torch.from_numpy(levels.copy()).to(self.device)
        return rows, reasons

    def _decoded(self, files: Sequence[Tensor]) -> Any:
        """An iterator over the levels of the files; None for one that nvJPEG refuses."""
        if not files:
            return iter(())
        try:
            return iter(self.decode(list(files)))
        except RuntimeError:  # one refused file fails the call
            return iter([self._alone(file) for file in files])

    def _alone(self, file: Tensor) -> Tensor | None:
        try:
            return self.decode([file])[0]
        except RuntimeError:
            return None


def open_gpu_decoder(device: torch.device) -> GpuDecoder:
    """The decoder on a GPU. Raises KdxError if torchvision is missing, if it has no nvJPEG, or if it does not decode a test image."""
    hint = "Leave --decoder out, or install torchvision's CUDA build for this PyTorch."
    if device.type != "cuda":
        raise KdxError(f"The decoder torchvision-cuda needs an NVIDIA GPU, and the device is {device}.", "Leave --decoder out.")
    io_ = import_optional("torchvision.io", "models", "The decoder torchvision-cuda")

    def decode(files: list[Tensor]) -> Sequence[Tensor]:
        levels: Sequence[Tensor] = io_.decode_jpeg(files, mode=io_.ImageReadMode.RGB, device=device)
        return levels

    decoder = GpuDecoder(device, decode)
    try:
        error = _error_on_grey(decoder)
    except Exception as problem:  # a build without nvJPEG raises RuntimeError, an older version TypeError
        raise KdxError(f"The decoder torchvision-cuda does not work here: {first_line(problem)}.", hint) from problem
    if error > _LEVELS_OFF:
        raise KdxError(f"The decoder torchvision-cuda is off by {error} grey levels on a plain image.", hint)
    return decoder


_LEVELS_OFF = 2


def _error_on_grey(decoder: GpuDecoder) -> int:
    """The largest error on an image of one colour, which every decoder gives within rounding."""
    colour = (90, 120, 150)
    file = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(file, "JPEG", quality=95)
    (levels,) = decoder.decode([_bytes(file.getvalue())])
    expected = torch.tensor(colour)[:, None, None].expand(3, 32, 48)
    return int((levels.cpu().int() - expected).abs().max())


# ---- files ----


@dataclass(frozen=True, eq=False)
class Jpeg:
    """The bytes of a file that nvJPEG decodes, and its EXIF orientation."""

    data: Tensor
    orientation: object


def jpeg_of(dataset: Dataset, index: int) -> Jpeg | None:
    """The file of an image if nvJPEG decodes it as Pillow does; else None. Raises nothing, because Pillow then reports the error."""
    file = dataset.files.get(dataset.ids[index])
    if file is None:  # several images share a file
        return None
    try:
        data = file if isinstance(file, bytes) else file.read_bytes()
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:  # reads the header, and checks the number of pixels
            names = [layer[0] for layer in getattr(image, "layer", ())]
            usual_colours = image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1 and names != [*b"RGB"]
            if not usual_colours or image.info.get("progressive") or _END not in data[-_PADDING:]:
                return None
            return Jpeg(_bytes(data), orientation_of(image))
    except Exception:  # as in `Dataset.read`
        return None


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


# ---- levels on the device ----


def upright(levels: Tensor, orientation: object) -> Tensor:
    """Levels [3, h, w] turned upright from an EXIF orientation: `kdx.data.pixels.turned`."""
    turns: dict[object, Callable[[Tensor], Tensor]] = {
        2: lambda x: x.flip(2),
        3: lambda x: x.flip(1, 2),
        4: lambda x: x.flip(1),
        5: lambda x: x.transpose(1, 2),
        6: lambda x: x.rot90(-1, (1, 2)),
        7: lambda x: x.flip(1, 2).transpose(1, 2),
        8: lambda x: x.rot90(1, (1, 2)),
    }
    return turns[orientation](levels) if orientation in turns else levels


def fit_levels(levels: Tensor, size: tuple[int, int], resizing: Resizing = COVER) -> Tensor:
    """Levels [3, h, w] uint8 brought to ``size`` = (height, width): `kdx.data.pixels.fit`, on the device of ``levels``.

    Pillow's weights have fewer digits, so some levels differ by one.
    """
    height, width = size
    if resizing.mode == "squash":
        return _resized(levels, size, resizing)
    own_height, own_width = levels.shape[1:]
    scales = height / own_height, width / own_width
    if resizing.mode == "letterbox":
        inside = max(1, min(height, round(own_height * min(scales)))), max(1, min(width, round(own_width * min(scales))))
        boxed = torch.tensor(BAR, dtype=torch.uint8, device=levels.device)[:, None, None].repeat(1, height, width)
        top, left = (height - inside[0]) // 2, (width - inside[1]) // 2
        boxed[:, top : top + inside[0], left : left + inside[1]] = _resized(levels, inside, resizing)
        return boxed
    covering = max(height, round(own_height * max(scales))), max(width, round(own_width * max(scales)))
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return _resized(levels, covering, resizing)[:, top : top + height, left : left + width]


def _resized(levels: Tensor, size: tuple[int, int], resizing: Resizing) -> Tensor:
    """The image resized along the width and then along the height, rounded to levels after each step, as in Pillow."""
    for shape in ((levels.shape[1], size[1]), size):
        if tuple(levels.shape[1:]) != shape:
            rows = functional.interpolate(levels[None].float(), shape, mode=resizing.interpolation, antialias=True, align_corners=False)
            levels = rows[0].round_().clamp_(0, 255).to(torch.uint8)
    return levels
