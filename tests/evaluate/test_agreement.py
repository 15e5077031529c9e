"""Agreement of maps in two contexts, and their sensitivity to noise: against definitions, Quantus, and cases with a known answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

import kdx
from kdx import KdxError
from kdx.evaluate.agreement import between_batches, between_references, max_sensitivity
from tests import oracle

N = 26
FEATURES, _, LABELS = oracle.features(n=N, classes=3)
CLASSES = LABELS.numpy()


def constant(rows: Tensor, *_: Tensor) -> dict[str, Tensor]:
    """Maps that depend on the image alone."""
    return {"map": FEATURES[rows].sum(1), "negative": -FEATURES[rows].sum(1)}


def test_maps_of_the_image_alone_agree_in_every_context() -> None:
    for agreement in (*between_batches(constant, CLASSES, 8).values(), *between_references(constant, CLASSES, 10).values()):
        assert oracle.error(agreement.rank_correlation, torch.ones(len(agreement.images))) < 1e-12
        assert oracle.error(agreement.correlation, torch.ones(len(agreement.images))) < 1e-12


def test_agreement_between_batches() -> None:
    """Each image is in one batch of each division; the two maps of an image are those of its two batches."""
    seen: list[tuple[Tensor, Tensor]] = []

    def maps_of(rows: Tensor) -> dict[str, Tensor]:
        maps = kdx.decompose(FEATURES[rows], LABELS[rows]).maps
        seen.append((rows, maps))
        return {"map": maps}

    agreement = between_batches(maps_of, CLASSES, 8, seed=1)["map"]
    rows = torch.cat([rows for rows, _ in seen])
    maps = torch.cat([maps for _, maps in seen])
    assert sorted(rows[:N].tolist()) == sorted(rows[N:].tolist()) == agreement.images.tolist() == list(range(N))
    assert {tuple(part.tolist()) for part, _ in seen[:4]} != {tuple(part.tolist()) for part, _ in seen[4:]}
    for image in range(N):
        one, other = maps[rows == image].flatten(1).numpy()
        assert float(agreement.rank_correlation[image]) == pytest.approx(spearmanr(one, other).statistic)
        assert float(agreement.correlation[image]) == pytest.approx(pearsonr(one, other).statistic)


def test_agreement_between_reference_sets() -> None:
    sets: list[tuple[Tensor, Tensor, Tensor]] = []

    def maps_of(rows: Tensor, references: Tensor) -> dict[str, Tensor]:
        together = torch.cat([rows, references])
        maps = kdx.decompose(FEATURES[together], LABELS[together]).maps[: len(rows)]
        sets.append((rows, references, maps))
        return {"map": maps}

    agreement = between_references(maps_of, CLASSES, 9, seed=2)["map"]
    (rows, first, one), (again, second, other) = sets
    assert torch.equal(rows, again) and torch.equal(rows, agreement.images)
    assert sorted(torch.cat([rows, first, second]).tolist()) == list(range(N))
    assert LABELS[first].bincount().tolist() == [3, 3, 3] and len(second) == 9
    for row, (a, b) in enumerate(zip(one.flatten(1), other.flatten(1), strict=True)):
        assert float(agreement.rank_correlation[row]) == pytest.approx(spearmanr(a, b).statistic)
    assert 0 < float(agreement.rank_correlation.mean()) < 1


def test_larger_batches_agree_more() -> None:
    """Each is the mean over five divisions.

    An image that is alone in its class, in a batch whose other classes are equally large, has a map of zeros, which has no ranks.
    """

    def mean(batch: int) -> float:
        def maps_of(rows: Tensor) -> dict[str, Tensor]:
            return {"map": kdx.decompose(FEATURES[rows], LABELS[rows]).maps}

        agreements = [between_batches(maps_of, CLASSES, batch, seed=2 * seed)["map"] for seed in range(5)]
        return float(np.nanmean(np.concatenate([agreement.rank_correlation for agreement in agreements])))

    assert mean(8) < mean(13)


def pixels() -> Tensor:
    return 0.1 + 0.8 * torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(0)).double()


def squared(images: Tensor) -> Tensor:
    return images.square().sum(1)


def named(images: Tensor) -> dict[str, Tensor]:
    return {"map": squared(images), "small": -1e-6 * squared(images)}


def recorded(images: Tensor, **options: Any) -> list[Tensor]:
    """The images and the noisy images of which `max_sensitivity` computes maps."""
    seen: list[Tensor] = []

    def maps_of(noisy: Tensor) -> dict[str, Tensor]:
        seen.append(noisy)
        return named(noisy)

    max_sensitivity(maps_of, images, **options)
    return seen


def test_sensitivity_by_definition() -> None:
    sensitivity, seen = (
        max_sensitivity(named, pixels(), radius=0.05, samples=4, seed=3)["map"],
        recorded(pixels(), radius=0.05, samples=4, seed=3),
    )
    assert len(seen) == 5 and torch.equal(seen[0], pixels())
    for row in range(5):
        changes = [np.linalg.norm(squared(noisy)[row] - squared(pixels())[row]) for noisy in seen[1:]]
        assert float(sensitivity[row]) == pytest.approx(max(changes) / np.linalg.norm(squared(pixels())[row]))
    noise = torch.stack(seen[1:]) - pixels()
    assert float(noise.abs().max()) <= 0.05 and float(noise.std()) == pytest.approx(0.05 / 3**0.5, rel=0.03)
    assert len({tuple(values.tolist()) for values in noise.flatten(0, 1).flatten(1)[:, :3]}) == 20


def test_sensitivity_does_not_depend_on_batches_or_scale() -> None:
    whole = max_sensitivity(named, pixels())["map"]
    parts = [max_sensitivity(named, pixels()[rows], numbers=rows)["map"] for rows in ([2, 0], [1, 3, 4])]
    assert oracle.error(torch.cat(parts)[torch.tensor([1, 2, 0, 3, 4])], whole) == 0
    assert oracle.error(max_sensitivity(named, pixels())["small"], whole) < 1e-9


def test_sensitivity_of_maps_that_ignore_the_image_and_of_empty_maps() -> None:
    sensitivity = max_sensitivity(lambda images: {"one": torch.ones(5, 4, 4), "zero": torch.zeros(5, 4, 4)}, pixels())
    assert float(sensitivity["one"].max()) == 0 and bool(sensitivity["zero"].isnan().all())
    assert all(part.min() >= 0 and part.max() <= 1 for part in recorded(pixels().round(), radius=0.2))


def test_sensitivity_of_quantus() -> None:
    """Of the maps of the images and the noisy images that the package used."""
    package = oracle.load("sensitivity", "quantus")
    images = torch.from_numpy(package["images"])
    used = iter([images, *torch.from_numpy(package["noisy"])])
    sensitivity = max_sensitivity(lambda _: named(next(used)), images)["map"]
    assert oracle.error(sensitivity, package["values"]) < 1e-6


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="contains all 26 images"):
        between_batches(constant, CLASSES, 26)
    with pytest.raises(KdxError, match="batch of 3"):
        between_batches(constant, CLASSES, 3)
    with pytest.raises(ValueError, match="leave none"):
        between_references(constant, CLASSES, 13)
    with pytest.raises(ValueError, match="radius"):
        max_sensitivity(named, pixels(), radius=0)
    with pytest.raises(ValueError, match="at least one sample"):
        max_sensitivity(named, pixels(), samples=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        max_sensitivity(named, 2 * pixels())
