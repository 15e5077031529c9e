"""Random changes of training images: shifts and mirroring, and the transforms of torchvision.

Everything follows from the generator of the epoch, not from PyTorch's: base and student see identical images although their networks
may use different numbers of random values. What happens to an image does not depend on the images beside it, except in mixup and cutmix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kdx.data.dataset import Indices
from kdx.distill.settings import TrainingSettings
from kdx.errors import KdxError, first_line, missing_package

_ASPECTS = (3 / 4, 4 / 3)  # of a random crop, as Szegedy et al. (2015) chose them


@dataclass(frozen=True)
class Draws:
    """The random choices for a batch of n images; None for what is switched off."""

    shifts: np.ndarray[tuple[int, int], np.dtype[np.int64]] | None
    """Offsets of the upper left corner in the padded image, [2, n]."""
    mirrored: np.ndarray[tuple[int], np.dtype[np.bool_]] | None
    transforms: Indices | None
    """The seed of each image's transforms, [n]."""
    mixing: int | None
    """The seed of mixup and cutmix."""


class Augmentation:
    """The augmentation of a training.

    - ``augment``: a shift by up to a twelfth of the shorter side, with the edge repeated. ``flip``: mirrored with probability 1/2.
    - ``random_crop``: a crop of this share of the area or more, with an aspect ratio from 3/4 to 4/3, resized to the image's size.
    - ``colour_jitter`` c: brightness, contrast and saturation times a number from [1 - c, 1 + c], hue shifted by up to c/4 of a turn.
    - ``rand_augment``: two operations of RandAugment (Cubuk et al. 2020) at this magnitude of 0 to 30.
    - ``mixup`` a (Zhang et al. 2018): images and labels are mixed with their neighbours' in the batch, in the ratio lambda : 1 - lambda
      with lambda ~ Beta(a, a). ``cutmix`` a (Yun et al. 2019): a rectangle of this area is replaced. With both, each batch has one of
      them. They mix within a process's part of a batch.

    All but the first line need torchvision (`torchvision.transforms.v2`). Raises KdxError if it cannot be imported.
    """

    def __init__(self, settings: TrainingSettings, size: tuple[int, int], classes: int) -> None:
        self.settings, self.size = settings, size
        self._transforms = _transforms(settings, size) if settings.uses_transforms else ()
        self._mix = _mixing(settings, classes) if settings.mixes_images else None

    @property
    def _reach(self) -> int:
        return max(1, min(self.size) // 12)

    def draw(self, count: int, generator: np.random.Generator) -> Draws:
        """The random choices for a batch."""
        settings = self.settings
        return Draws(
            shifts=generator.integers(0, 2 * self._reach + 1, (2, count)) if settings.augment else None,
            mirrored=generator.random(count) < 0.5 if settings.flip else None,
            transforms=generator.integers(0, 2**62, count) if self._transforms else None,
            mixing=int(generator.integers(0, 2**62)) if self._mix is not None else None,
        )

    def apply(self, pixels: Tensor, labels: Tensor, draws: Draws, rows: Indices) -> tuple[Tensor, Tensor]:
        """Augmented images [n, 3, H, W] in [0, 1], and labels [n], or [n, classes] where images are mixed.

        rows: the images' places [n] in the batch of ``draws``.
        """
        if draws.shifts is not None:
            pixels = self._shifted(pixels, draws.shifts[:, rows])
        if draws.mirrored is not None:
            mirrored = torch.from_numpy(draws.mirrored[rows])
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        if draws.transforms is not None and len(pixels):
            pixels = torch.stack([self._transformed(image, int(seed)) for image, seed in zip(pixels, draws.transforms[rows], strict=True)])
        if draws.mixing is not None and self._mix is not None:
            with _seeded_cpu(draws.mixing):
                pixels, labels = self._mix(pixels, labels)
        return pixels, labels

    def _shifted(self, pixels: Tensor, shifts: np.ndarray[Any, Any]) -> Tensor:
        (height, width), reach = pixels.shape[2:], self._reach
        padded = functional.pad(pixels, (reach, reach, reach, reach), mode="replicate")
        return torch.stack([padded[i, :, top : top + height, left : left + width] for i, (top, left) in enumerate(shifts.T)])

    def _transformed(self, image: Tensor, seed: int) -> Tensor:
        with _seeded_cpu(seed):
            for transform in self._transforms:
                image = transform(image)
        return image.clamp(0, 1)


@contextmanager
def _seeded_cpu(seed: int) -> Iterator[None]:
    """Inside the block, PyTorch's generator of the CPU follows from the seed. Afterwards it is as it was before."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _torchvision() -> Any:
    try:
        from torchvision.transforms import v2
    except ModuleNotFoundError as error:
        raise missing_package("torchvision", "distill", "This augmentation") from error
    except Exception as error:  # torchvision for another version of PyTorch
        raise KdxError(
            f"torchvision cannot be imported: {first_line(error)}.", "Install the version of torchvision that belongs to this PyTorch."
        ) from error
    return v2


def _transforms(settings: TrainingSettings, size: tuple[int, int]) -> Sequence[Callable[[Tensor], Tensor]]:
    v2, strength = _torchvision(), settings.colour_jitter
    transforms = []
    if settings.random_crop is not None:
        transforms.append(v2.RandomResizedCrop(size, scale=(settings.random_crop, 1.0), ratio=_ASPECTS, antialias=True))
    if strength:
        transforms.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    if settings.rand_augment is not None:
        transforms.append(v2.RandAugment(magnitude=settings.rand_augment, fill=[0.5, 0.5, 0.5]))
    return transforms


def _mixing(settings: TrainingSettings, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    v2 = _torchvision()
    mixes = [
        mix(alpha=alpha, num_classes=classes) for mix, alpha in ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix)) if alpha > 0
    ]
    choice: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = mixes[0] if len(mixes) == 1 else v2.RandomChoice(mixes)
    return choice
