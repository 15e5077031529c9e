"""Masks against a sort; salient images against their steps, against hooks, and against the equation that imputed pixels solve."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx import KdxError
from kdx.export.graphs import GradientGraph
from kdx.runtimes.eager import EagerRunner
from tests import oracle
from tests.hooked import CLASSES, SIZE, Blocks, Net, batch, by_hand

CPU = torch.device("cpu")


# ---- masks ----


@pytest.mark.parametrize("share", [0.0, 0.013, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_a_mask_keeps_the_largest(share: float, dtype: torch.dtype) -> None:
    maps = torch.randn(7, 11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    mask = kdx.top_mask(maps.transpose(1, 2), share)
    kept = round(share * 55)
    assert mask.dtype == torch.bool and mask.shape == (7, 5, 11) and mask.sum((1, 2)).tolist() == [kept] * 7
    for values, chosen in zip(maps.transpose(1, 2).double(), mask, strict=True):
        assert sorted(values[chosen].tolist()) == sorted(values.flatten().tolist())[55 - kept :]


def test_the_first_of_equal_pixels_in_reading_order_is_kept() -> None:
    """A map larger than one block of a sort, because an unstable sort of few values may be stable by chance."""
    maps = np.random.default_rng(0).integers(0, 3, size=(2, 67, 71)).astype(np.float32)
    mask = kdx.top_mask(maps, 0.4)
    assert isinstance(mask, np.ndarray) and mask.dtype == bool
    for values, chosen in zip(maps.reshape(2, -1), mask.reshape(2, -1), strict=True):
        order = sorted(range(len(values)), key=lambda pixel: (-values[pixel], pixel))
        assert set(np.flatnonzero(chosen)) == set(order[: round(0.4 * len(values))])
    constant = kdx.top_mask(np.zeros((1, 4, 5)), 0.5)
    assert constant[0, :2].all() and not constant[0, 2:].any()


def test_a_larger_mask_contains_the_smaller() -> None:
    maps = torch.randint(0, 5, (3, 9, 8), generator=torch.Generator().manual_seed(0)).double()
    shares = [0.1, 0.2, 0.7, 0.9]
    masks = [kdx.top_mask(maps, share) for share in shares]
    for small, large in itertools.pairwise(masks):
        assert bool((large | ~small).all())


@pytest.mark.parametrize(
    ("maps", "share", "message"),
    [
        (torch.zeros(3, 4), 0.5, r"shape \[3, 4\]"),
        (torch.zeros(3, 4, 4).bool(), 0.5, "bool"),
        (torch.zeros(3, 4, 4).index_fill(0, torch.tensor([1]), torch.nan), 0.5, r"NaN in rows 1\."),
        (torch.zeros(3, 4, 4), 1.01, "share 1.01"),
        (torch.zeros(3, 4, 4), -0.1, "share -0.1"),
        (torch.zeros(3, 4, 4), 30, "share 30"),
        (torch.zeros(3, 4, 4), float("nan"), "share nan"),
    ],
)
def test_a_bad_mask_is_refused(maps: Tensor, share: float, message: str) -> None:
    with pytest.raises(KdxError, match=message):
        kdx.top_mask(maps, share)


# ---- salient images ----


def steps(network: Any, images: Any, layer: str, keep: float, classes: Any) -> Any:
    """Salient images, computed step by step with the public functions."""
    size = images.shape[2], images.shape[3]
    return kdx.impute(images, kdx.top_mask(kdx.hires_cam(network, images, layer, classes).scaled(size), keep))


def neighbours_mean(images: Tensor) -> Tensor:
    """The weighted mean of each pixel's neighbours, with weights 1/6 and 1/12 that are normalised at the border."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=images.dtype)[None, None] / 12
    totals, counts = (nn.functional.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1) for x in (images, torch.ones_like(images)))
    return (totals / counts).reshape(images.shape)


@pytest.mark.parametrize("choice", ["predicted", "each"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.93])
def test_salient_images_equal_their_steps(choice: str, keep: float) -> None:
    network, images = Net().double().eval(), batch()
    classes = None if choice == "predicted" else torch.arange(8) % CLASSES
    salient = kdx.salient_images(network, images, "conv2", keep, classes)
    assert torch.equal(salient, steps(network, images, "conv2", keep, classes))
    maps = by_hand(network, images, "conv2", classes, "elementwise").maps
    resized = nn.functional.interpolate(maps[:, None], SIZE, mode="bilinear", align_corners=False)[:, 0]
    kept = (salient == images).all(1)
    count = round(keep * SIZE[0] * SIZE[1])
    for values, mask in zip(resized, kept, strict=True):
        assert int(mask.sum()) == count
        assert float(values[mask].min()) >= float(values[~mask].max()) - 1e-9
    off = (salient - neighbours_mean(salient)).abs().amax(1)
    assert float(off[~kept].max()) < 1e-4


def test_a_file_gives_the_salient_images_of_its_maps(gradients_file: Path) -> None:
    path, images = gradients_file, batch(dtype=torch.float32)
    assert torch.equal(kdx.salient_images(path, images, "conv2", 0.3, chunk=3), steps(path, images, "conv2", 0.3, None))


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_chunk_changes_no_salient_image(chunk: int) -> None:
    network, images = Net().double().eval(), batch()
    for noise in (0.0, 0.1):
        whole, parts = (kdx.salient_images(network, images, "conv2", noise=noise, chunk=size) for size in (None, chunk))
        assert oracle.error(parts, whole) < 1e-9


def test_salient_images_have_the_kind_of_the_images() -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    salient = kdx.salient_images(network, images.numpy(), "conv2")
    assert isinstance(salient, np.ndarray) and salient.dtype == np.float32
    assert np.array_equal(salient, kdx.salient_images(network, images, "conv2").numpy())
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert oracle.error(kdx.salient_images(network, strided, "conv2"), salient) < 1e-4  # what imputation is solved to
    assert kdx.salient_images(network, images.half(), "conv2").dtype == torch.float16


class Normed(nn.Module):
    """Patches as tokens whose scale a normalisation removes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 3, 3)
        self.mixed = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, CLASSES)
        nn.init.normal_(self.norm.bias)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.mixed(self.patch(images).flatten(2).transpose(1, 2)))
        logits: Tensor = self.fc(tokens.mean(1))
        return logits


@pytest.mark.parametrize(("network", "layer"), [(Normed(), "mixed"), (Blocks(), "last")])
def test_a_layer_whose_maps_are_zero_up_to_rounding_is_refused(network: nn.Module, layer: str) -> None:
    images = batch(dtype=torch.float32, size=(12, 9))
    with pytest.raises(KdxError, match=f"HiResCAM at layer '{layer}' is zero everywhere") as caught:
        kdx.salient_images(network, images, layer)
    assert "normalisation that reads that layer" in caught.value.hint


def test_the_normalisation_that_follows_ranks_pixels() -> None:
    images = batch(dtype=torch.float32, size=(12, 9))
    assert torch.equal(kdx.salient_images(Normed(), images, "norm"), steps(Normed(), images, "norm", 0.5, None))


def test_the_first_rows_of_an_image_with_a_zero_map_are_kept() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4 * 10 * 7, CLASSES)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), linear).double()
    images = batch(size=(12, 9))
    images[3] = 0
    with torch.no_grad():
        linear.weight.abs_()
    images[6] = 0
    with pytest.warns(UserWarning, match=r"zero everywhere in rows 3, 6, so the first rows") as record:
        salient = kdx.salient_images(network, images, "1", classes=2, noise=0.1)
    assert record[0].filename == __file__ and kdx.hires_cam(network, images, "1", 2).empty == 2 / 8
    kept = (salient == images).all(1)[3]
    assert kept[:6].all() and not kept[6:].any()


def test_noise_is_seeded_and_only_on_imputed_pixels() -> None:
    network, images = Net().double().eval(), batch()
    plain, noisy, again, other = (
        kdx.salient_images(network, images, "conv2", noise=noise, seed=seed) for noise, seed in ((0.0, 1), (0.1, 1), (0.1, 1), (0.1, 2))
    )
    kept = (plain == images).all(1)[:, None].expand(images.shape)
    assert torch.equal(noisy, again) and torch.equal(noisy[kept], images[kept]) and torch.equal(other[kept], images[kept])
    drawn, second = (noisy - plain)[~kept], (other - plain)[~kept]
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.1) and abs(float(drawn.mean())) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([drawn, second]))[0, 1])) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "share 0 of pixels to keep is not between 0 and 1"),
        ({"keep": 1}, "share 1 of pixels"),
        ({"keep": 1.5}, "share 1.5 of pixels"),
        ({"keep": float("nan")}, "share nan of pixels"),
        ({"keep": 1e-4}, "keeps no|nothing"),
        ({"noise": -0.1}, "noise -0.1 is not a standard deviation"),
        ({"noise": float("inf")}, "noise inf"),
        ({"classes": 5}, "no class 5"),
        ({"layer": "conv4"}, "no layer 'conv4'"),
        ({"images": batch()[:, :2]}, "images have shape"),
    ],
)
def test_bad_arguments_of_salient_images_are_refused(arguments: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"images": batch(), "layer": "conv2"} | arguments
    with pytest.raises(KdxError, match=message):
        kdx.salient_images(Net().double(), **options)


def test_gradients_of_a_feature_layer_are_refused() -> None:
    network = Net().double().eval()
    with EagerRunner(GradientGraph(network, ["conv1"], at="conv2"), CPU) as runner, pytest.raises(KdxError, match="not of the logits"):
        kdx.salient_images(runner, batch())


@pytest.mark.parametrize("shared", [True, False])
def test_imputing_keeps_what_is_kept_and_solves_for_the_rest(shared: bool) -> None:
    images = batch()
    kept = torch.rand(8, *SIZE, generator=torch.Generator().manual_seed(2)) < 0.3
    kept = kept[0] if shared else kept
    imputed = kdx.impute(images.numpy(), kept.numpy())
    assert isinstance(imputed, np.ndarray) and np.array_equal(imputed, kdx.impute(images, kept).numpy())
    result, mask = torch.from_numpy(imputed), kept.expand(8, *SIZE)[:, None].expand(images.shape)
    assert torch.equal(result[mask], images[mask])
    assert float((result - neighbours_mean(result))[~mask].abs().max()) < 1e-4
