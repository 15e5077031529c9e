"""Augmentation: each change by what it must do to an image, and independence of everything but the generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from kdx.distill import TrainingSettings
from kdx.distill.augmentation import Augmentation
from kdx.errors import KdxError

SIZE = (12, 16)
TRANSFORMS: dict[str, Any] = {"random_crop": 0.3, "colour_jitter": 0.4, "rand_augment": 9}


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def changed(settings: Mapping[str, Any], pixels: torch.Tensor, labels: torch.Tensor | None = None, seed: int = 0) -> Any:
    augmentation = Augmentation(TrainingSettings(**settings), SIZE, 5)
    draws = augmentation.draw(len(pixels), np.random.default_rng(seed))
    labels = torch.arange(len(pixels)) % 5 if labels is None else labels
    return augmentation.apply(pixels, labels, draws, np.arange(len(pixels)))


def test_without_settings_nothing_changes_and_nothing_is_drawn() -> None:
    generator = np.random.default_rng(0)
    draws = Augmentation(TrainingSettings(), SIZE, 5).draw(6, generator)
    assert generator.bit_generator.state == np.random.default_rng(0).bit_generator.state
    pixels, labels = Augmentation(TrainingSettings(), SIZE, 5).apply(images(), torch.arange(6), draws, np.arange(6))
    assert torch.equal(pixels, images()) and torch.equal(labels, torch.arange(6))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_depend_on_the_image_and_its_draw_alone(name: str) -> None:
    augmentation = Augmentation(TrainingSettings(**{name: TRANSFORMS[name]}), SIZE, 5)
    draws, pixels, labels = augmentation.draw(6, np.random.default_rng(1)), images(), torch.arange(6)
    before = torch.get_rng_state()
    whole, _ = augmentation.apply(pixels, labels, draws, np.arange(6))
    torch.rand(3)  # networks use PyTorch's generator between the parts
    parts = [augmentation.apply(pixels[rows], labels[rows], draws, rows)[0] for rows in (np.array([0, 1, 2]), np.array([3, 5]))]
    assert torch.equal(torch.cat(parts), whole[[0, 1, 2, 3, 5]])
    assert whole.shape == pixels.shape and whole.min() >= 0 and whole.max() <= 1
    assert sum(not torch.equal(one, two) for one, two in zip(whole, pixels, strict=True)) >= 4
    torch.set_rng_state(before)
    assert torch.equal(augmentation.apply(pixels, labels, draws, np.arange(6))[0], whole) and torch.equal(torch.get_rng_state(), before)
    other = augmentation.draw(6, np.random.default_rng(2))
    assert not torch.equal(augmentation.apply(pixels, labels, other, np.arange(6))[0], whole)


def test_a_random_crop_shows_at_least_its_share_of_the_image() -> None:
    """In an image of two ramps, the range of each ramp in the crop is the share of that side that the crop shows."""
    height, width = 60, 80
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    ramps = torch.stack([rows.expand(height, width), columns.expand(height, width), torch.zeros(height, width)]).expand(200, -1, -1, -1)
    augmentation = Augmentation(TrainingSettings(random_crop=0.25), (height, width), 5)
    draws = augmentation.draw(200, np.random.default_rng(0))
    crops, _ = augmentation.apply(ramps, torch.zeros(200), draws, np.arange(200))
    sides = (crops.amax((2, 3)) - crops.amin((2, 3)))[:, :2]
    shares = sides.prod(1)
    assert 0.2 < shares.min() < 0.35 and shares.max() > 0.9
    ratios = sides[:, 1] * width / (sides[:, 0] * height)
    assert 0.7 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.4


def test_colour_jitter_keeps_a_grey_image_grey_and_its_shapes() -> None:
    grey = torch.full((40, 3, *SIZE), 0.5)
    pixels, _ = changed({"colour_jitter": 0.4}, grey)
    levels = pixels.mean((1, 2, 3))
    assert torch.allclose(pixels, levels[:, None, None, None].expand_as(pixels), atol=1e-5)
    assert 0.29 < levels.min() < 0.35 and 0.65 < levels.max() < 0.71


def test_mixup_mixes_labels_as_it_mixes_images() -> None:
    """Image i is constant with the value i, so its pixels give the share of each of the two images."""
    values = torch.arange(5) / 4
    pixels, labels = changed({"mixup": 1.0}, values[:, None, None, None].expand(5, 3, *SIZE), torch.arange(5))
    assert labels.shape == (5, 5) and torch.allclose(labels.sum(1), torch.ones(5))
    assert torch.allclose(pixels[:, 0, 0, 0], labels @ values, atol=1e-6)
    shares = labels.max(1).values
    assert (labels > 0).sum(1).tolist() == [2] * 5 and torch.allclose(shares, shares[0].expand(5))


def test_cutmix_mixes_labels_by_the_area_of_the_rectangle() -> None:
    for seed in range(5):
        constant = (torch.arange(5) / 4)[:, None, None, None].expand(5, 3, *SIZE)
        pixels, labels = changed({"cutmix": 1.0}, constant, torch.arange(5), seed)
        for image, label in zip(pixels, labels, strict=True):
            areas = torch.stack([(image[0] == value / 4).float().mean() for value in range(5)])
            assert torch.allclose(areas, label, atol=1e-6)


def test_mixing_differs_from_batch_to_batch_and_both_kinds_occur() -> None:
    augmentation, generator = Augmentation(TrainingSettings(mixup=1.0, cutmix=1.0), SIZE, 5), np.random.default_rng(0)
    constant = (torch.arange(5) / 4)[:, None, None, None].expand(5, 3, *SIZE)
    kinds = set()
    for _ in range(12):
        pixels, _ = augmentation.apply(constant, torch.arange(5), augmentation.draw(5, generator), np.arange(5))
        kinds.add("cutmix" if len(pixels[1, 0].unique()) > 1 else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_without_torchvision_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(KdxError, match=r"torchvision, which is not installed.*\n.*kdx\[distill\]"):
        Augmentation(TrainingSettings(random_crop=0.5), SIZE, 5)
    Augmentation(TrainingSettings(augment=True, flip=True), SIZE, 5)
