"""Salient images as in the authors' code: which pixels they keep, their contrast, and their noise."""

from __future__ import annotations

import numpy as np
import torch

import kdx
from kdx.export.graphs import Preprocessing
from kdx.maps.published_images import published_images

PREPROCESSING = Preprocessing(None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def read_by_the_network(images: torch.Tensor) -> np.ndarray:
    """What the network computes on, after its preprocessing."""
    mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return ((images - mean) / std).numpy()


def test_the_network_reads_images_of_256_levels_with_mean_one_half_and_deviation_one_tenth() -> None:
    rng = np.random.default_rng(0)
    images, maps = torch.from_numpy(rng.random((5, 3, 40, 40))), torch.from_numpy(rng.random((5, 8, 8)))
    shown = read_by_the_network(published_images(images, maps, PREPROCESSING, 0.5, 0.0, 0))
    assert np.abs(255 * shown - np.rint(255 * shown)).max() < 1e-9 and shown.min() >= 0 and shown.max() <= 1
    assert np.abs(shown.mean((1, 2, 3)) - 0.5).max() < 0.003 and np.abs(shown.std((1, 2, 3)) - 0.1).max() < 0.003


def test_ties_are_removed_together_and_noise_is_on_removed_pixels_only() -> None:
    """Where the map is zero on 70% of the pixels, only the other 30% are kept; kdx.top_mask keeps half."""
    images = torch.from_numpy(np.random.default_rng(1).random((1, 3, 10, 10)))
    maps = torch.zeros(1, 10, 10, dtype=torch.float64)
    maps[0, :3] = torch.arange(1, 31, dtype=torch.float64).view(3, 10)
    results = [
        published_images(images, maps, Preprocessing(), 0.5, noise, seed) for noise, seed in ((0.0, 0), (1e-3, 0), (1e-3, 0), (1e-3, 1))
    ]
    pixels = images[0].numpy()
    imputed = kdx.impute(pixels[None], maps.numpy() > 0)[0]
    flat = (imputed - imputed.mean()) / (imputed.std() + 1e-5) * 0.1 + 0.5
    assert np.abs(results[0][0].numpy() - np.floor(flat.clip(0, 1) * 255) / 255).max() < 1.01 / 255
    assert torch.equal(results[1], results[2]) and not torch.equal(results[1], results[3])
    assert float(kdx.top_mask(maps, 0.5).double().mean()) == 0.5


def test_an_image_with_an_empty_map_is_kept() -> None:
    images = torch.from_numpy(np.random.default_rng(2).random((2, 3, 6, 6)))
    maps = torch.zeros(2, 3, 3, dtype=torch.float64)
    result = published_images(images, maps, Preprocessing(), 0.5, 0.5, 0)
    flat = images.flatten(1).numpy()
    expected = (flat - flat.mean(1, keepdims=True)) / (flat.std(1, keepdims=True) + 1e-5) * 0.1 + 0.5
    assert np.abs(result.flatten(1).numpy() - np.floor(expected.clip(0, 1) * 255) / 255).max() < 1.01 / 255
