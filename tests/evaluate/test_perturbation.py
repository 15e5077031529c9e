"""Insertion, deletion and ROAD against slow computations by definition, pytorch-grad-cam and Quantus, and their properties."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from kdx.evaluate.perturbation import Baseline, Order, blurred, deletion, insertion, road
from kdx.evaluate.scoring import Scoring, probability_and_gain, probability_gain, student_probability
from kdx.kernels import reference
from tests import oracle
from tests.evaluate import scenes
from tests.oracle.road import PERCENTILES, Readout

BRIGHT = torch.ones(scenes.N, dtype=torch.int64)


def brightness(weights: Tensor) -> Scoring:
    """A score that increases with every pixel."""
    return lambda pixels: (pixels.double() * weights).sum((1, 2, 3))


def distinct_maps(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(h * w, generator=generator) for _ in range(n)]).reshape(n, h, w).double()


def slow_curve(scoring: Scoring, image: Tensor, values: Tensor, baseline: Tensor, steps: int, *, removes: bool) -> list[float]:
    """The curve of one image, pixel by pixel (the score of an image is that of a batch of one)."""
    h, w = values.shape
    order = sorted(((y, x) for y in range(h) for x in range(w)), key=lambda at: -float(values[at]))
    pixels, other = (image, baseline) if removes else (baseline, image)
    pixels = pixels.clone()
    curve = [float(scoring(pixels[None]))]
    for step in range(1, steps + 1):
        for y, x in order[round((step - 1) * h * w / steps) : round(step * h * w / steps)]:
            pixels[:, y, x] = other[:, y, x]
        curve.append(float(scoring(pixels[None])))
    return curve


@pytest.mark.parametrize("steps", [1, 7, 35])
@pytest.mark.parametrize("baseline", ["mean", "zero", "blurred"])
def test_curves_by_definition(steps: int, baseline: Baseline) -> None:
    images, maps = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0)).double(), distinct_maps(3, 5, 7)
    scoring = brightness(torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    replaced = {"mean": images.mean((2, 3), keepdim=True).expand_as(images), "zero": 0 * images, "blurred": blurred(images)}[baseline]
    for function, removes in ((deletion, True), (insertion, False)):
        curves = function(scoring, images, maps, steps=steps, baseline=baseline)
        slow = [slow_curve(scoring, *row, steps, removes=removes) for row in zip(images, maps, replaced, strict=True)]
        assert oracle.error(curves.values, slow) < 1e-12
        # The area of the code of RISE: (sum - first / 2 - last / 2) / (number of values - 1).
        areas = [(sum(curve) - curve[0] / 2 - curve[-1] / 2) / (len(curve) - 1) for curve in slow]
        assert oracle.error(curves.area, areas) < 1e-12
        assert curves.shares.tolist() == [round(step * 35 / steps) / 35 for step in range(steps + 1)]


def test_blur() -> None:
    """SciPy's Gaussian filter, which repeats border pixels under the name "nearest"."""
    images = torch.rand(2, 3, 21, 30, generator=torch.Generator().manual_seed(0)).double()
    expected = gaussian_filter(images.numpy(), (0, 0, 2.1, 2.1), mode="nearest", radius=(0, 0, 7, 7))
    assert oracle.error(blurred(images), expected) < 1e-12


@pytest.mark.parametrize("order", ["most", "least"])
def test_road_by_definition(order: Order) -> None:
    images, maps = torch.rand(3, 3, 6, 7, generator=torch.Generator().manual_seed(0)).double(), distinct_maps(3, 6, 7)
    scoring = brightness(torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    shares = (0.1, 0.45, 0.9)
    curves = road(scoring, images, maps, order=order, shares=shares, noise=0)
    for row, (image, values) in enumerate(zip(images, maps, strict=True)):
        flat = values.flatten().sort(descending=order == "most").values
        for column, share in enumerate(shares):
            removed = torch.isin(values, flat[: round(share * 42)])
            expected = scoring(reference.imputed(image, ~removed)[None])
            assert float(curves.values[row, column]) == pytest.approx(float(expected), abs=1e-3)
    assert torch.equal(curves.area, curves.values.mean(1))


def test_road_of_pytorch_grad_cam() -> None:
    known = {name: torch.from_numpy(value) for name, value in oracle.load("road", "road").items()}
    scoring = student_probability(Readout(known["weight"]), known["classes"])
    areas = {}
    for order in ("most", "least"):
        curves = road(scoring, known["images"], known["maps"], order=order, noise=0)
        # The package's percentile is the share that is kept.
        expected = torch.stack([known[f"{order}/{percentile}"] for percentile in reversed(PERCENTILES)], 1)
        assert float((curves.values - expected).abs().max()) < 1e-4
        areas[order] = curves
    combined = sum(known[f"least/{percentile}"] - known[f"most/{percentile}"] for percentile in PERCENTILES) / 2 / len(PERCENTILES)
    assert float(((areas["least"].area - areas["most"].area) / 2 - combined).abs().max()) < 1e-4


def test_deletion_of_quantus() -> None:
    """Its PixelFlipping removes values and not pixels, so the images have one channel. Its black is the smallest value, here 0."""
    package, known = oracle.load("deletion", "quantus"), oracle.load("road", "road")
    network = Readout(known["weight"][:120]).eval()
    scoring = student_probability(network, torch.from_numpy(known["classes"]))
    images, maps = torch.from_numpy(package["images"]), torch.from_numpy(known["maps"])
    curves = deletion(scoring, images, maps, steps=10, baseline="zero")
    assert oracle.error(curves.values[:, 1:], package["values"]) < 1e-6


def test_a_map_of_what_the_network_reads_beats_uniform_and_centre_maps() -> None:
    images = scenes.images()
    scoring = student_probability(scenes.PatchReader(), BRIGHT)
    maps = {"patch": scenes.patch_map(), "uniform": scenes.uniform_map(), "centre": scenes.centre_map()}
    better: dict[str, dict[str, Tensor]] = {"deletion": {}, "insertion": {}, "remove": {}, "keep": {}, "difference": {}}
    for name, values in maps.items():
        better["deletion"][name] = -deletion(scoring, images, values).area
        better["insertion"][name] = insertion(scoring, images, values).area
        remove, keep = (road(scoring, images, values, order=order, shares=(0.2, 0.5, 0.8)) for order in ("most", "least"))
        better["remove"][name], better["keep"][name] = -remove.area, keep.area
        better["difference"][name] = (keep.area - remove.area) / 2
    for metric, areas in better.items():
        assert bool((areas["patch"] > areas["uniform"] + 0.05).all()), metric
        assert bool((areas["patch"] > areas["centre"] + 0.05).all()), metric


def test_curves_of_a_monotone_score_are_monotone_and_its_own_map_is_the_best() -> None:
    images = scenes.images() + 0.1
    weights = torch.rand(3, *scenes.SIZE, generator=torch.Generator().manual_seed(3)).double()
    scoring = brightness(weights)
    contributions = (images * weights).sum(1)
    for maps in (contributions, scenes.centre_map(), scenes.uniform_map(), -contributions):
        assert bool((deletion(scoring, images, maps, baseline="zero").values.diff(dim=1) < 0).all())
        assert bool((insertion(scoring, images, maps, baseline="zero").values.diff(dim=1) > 0).all())
    areas = [deletion(scoring, images, maps, baseline="zero").area for maps in (contributions, scenes.centre_map(), -contributions)]
    assert bool((areas[0] < areas[1]).all() and (areas[1] < areas[2]).all())
    # Insertion of pixels in some order is deletion in the reverse order.
    reversed_order = insertion(scoring, images, contributions, steps=30, baseline="zero").values
    assert oracle.error(reversed_order, deletion(scoring, images, -contributions, steps=30, baseline="zero").values.flip(1)) < 1e-12


def test_results_do_not_depend_on_batches() -> None:
    images, maps = scenes.images(), scenes.uniform_map()
    weights = torch.randn(3, *scenes.SIZE, generator=torch.Generator().manual_seed(4)).double()
    scoring = brightness(weights)
    for function in (deletion, insertion, partial(road, shares=(0.3, 0.6))):
        whole = function(scoring, images, maps, seed=3)
        parts = [function(scoring, images[rows], maps[rows], seed=3, numbers=rows) for rows in ([4, 0], [1, 2, 3], [5])]
        joined = torch.cat([part.values for part in parts])[torch.tensor([1, 2, 3, 4, 0, 5])]
        assert oracle.error(joined, whole.values) < 1e-4
        assert oracle.error(function(scoring, images, maps, seed=4).values, whole.values) > 1e-4


def test_noise_of_imputed_pixels() -> None:
    """The noise has the given size, stands in imputed pixels alone, and differs between images and shares."""
    images = scenes.images()
    seen: list[Tensor] = []

    def scoring(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels[:, 0, 0, 0]

    for noise in (0.0, 0.05):
        road(scoring, images, scenes.patch_map(), shares=(0.5, 0.6), noise=noise)
    drawn = [noisy - plain for plain, noisy in zip(seen[:2], seen[2:], strict=True)]
    assert float(drawn[0][drawn[0] != 0].std()) == pytest.approx(0.05, rel=0.05)
    assert float((drawn[0] == 0).double().mean()) == 0.5 and bool((seen[2][drawn[0] == 0] == images[drawn[0] == 0]).all())
    for one, other in itertools.combinations([*drawn[0][:2].flatten(1), *drawn[1][:2].flatten(1)], 2):
        assert abs(float(np.corrcoef(one, other)[0, 1])) < 0.1


def test_scoring_functions() -> None:
    images = scenes.images()
    student = scenes.PatchReader()
    expected = student(images).softmax(1)[:, 1]
    assert torch.equal(student_probability(student, BRIGHT)(images), expected)
    assert oracle.error(probability_gain(student, scenes.Constant(), BRIGHT)(images), expected - 0.5) < 1e-6
    # The gain over a constant network has the curves of the student, shifted.
    curves = [
        deletion(scoring, images, scenes.centre_map()).values
        for scoring in (student_probability(student, BRIGHT), probability_gain(student, scenes.Constant(), BRIGHT))
    ]
    assert oracle.error(curves[1] + 0.5, curves[0]) < 1e-6
    both = probability_and_gain(student, scenes.Constant(), BRIGHT)
    for function in (deletion, insertion, partial(road, shares=(0.4,))):
        joint = function(both, images, scenes.centre_map())
        single = function(probability_gain(student, scenes.Constant(), BRIGHT), images, scenes.centre_map())
        assert torch.equal(joint.values[..., 1], single.values) and torch.equal(joint.area[:, 1], single.area)
    assert float(deletion(probability_gain(student, student, BRIGHT), images, scenes.patch_map()).values.abs().max()) == 0


def test_mistakes() -> None:
    images, maps = scenes.images(), scenes.patch_map()
    scoring = student_probability(scenes.PatchReader(), BRIGHT)
    with pytest.raises(ValueError, match="at least one step"):
        deletion(scoring, images, maps, steps=0)
    with pytest.raises(ValueError, match="one map each"):
        insertion(scoring, images, maps[:2])
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        road(scoring, images, maps, shares=(0.5, 1.0))
    with pytest.raises(ValueError, match="scoring function returns"):
        deletion(lambda pixels: pixels, images, maps)
