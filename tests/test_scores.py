"""FSS and RS as a user calls them: their values, intervals and p-values."""

from __future__ import annotations

from collections.abc import Callable

import dcor
import numpy as np
import pytest
import torch
from torch import Tensor

import kdx
from kdx import scores
from tests import oracle


@pytest.mark.parametrize("case", oracle.CASES)
def test_published_numbers(case: str) -> None:
    known = oracle.load(case)
    x, y, target = known["x"], known["y"], known["target"]
    for found, key in (
        (kdx.fss(x, y, permutations=9), "dcor_unbiased_xy"),
        (kdx.fss(x, y, "biased", permutations=9), "dcor_library_biased_xy"),
        (kdx.rs(x, target, permutations=9), "dcor_unbiased_xg"),
        (kdx.rs(x, target, y, permutations=9), "semipartial_xg_given_y"),
        (kdx.rs(y, target, x, permutations=9), "semipartial_yg_given_x"),
        (kdx.partial_rs(x, target, y, permutations=9), "dcor_library_partial_xg_given_y"),
    ):
        assert found.value == pytest.approx(float(known[key]), rel=1e-9), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", oracle.CASES)
def test_published_numbers_from_narrow_features(case: str, dtype: torch.dtype) -> None:
    known = oracle.load(case)
    x, y = (torch.from_numpy(known[key]).to(dtype) for key in ("x", "y"))
    found = kdx.fss(x, y, permutations=0).value
    assert abs(found - float(known["dcor_unbiased_xy"])) < oracle.TOLERANCE[str(dtype).removeprefix("torch.")]


def test_partial_is_dcors_on_random_data() -> None:
    rng = np.random.default_rng(5)
    x, y, z = rng.normal(size=(29, 7)), rng.normal(size=(29, 3)), rng.normal(size=(29, 2))
    assert kdx.partial_rs(x, y, z, permutations=0).value == pytest.approx(dcor.partial_distance_correlation(x, y, z), rel=1e-9)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_scale_rotation_shift_and_order_change_nothing(estimator: str) -> None:
    x, y, labels = oracle.features()
    rotation = torch.linalg.qr(torch.randn(165, 165, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1))
    plain = kdx.fss(x, y, estimator, permutations=0).value  # type: ignore[arg-type]
    turned = 1e-4 * x.flatten(1) @ rotation + 17
    assert kdx.fss(turned, y, estimator, permutations=0).value == pytest.approx(plain, rel=1e-9)  # type: ignore[arg-type]
    assert kdx.fss(y[order], turned[order], estimator, permutations=0).value == pytest.approx(plain, rel=1e-9)  # type: ignore[arg-type]
    given = kdx.rs(x, labels, y, permutations=0).value
    assert kdx.rs(turned[order], labels[order], -3 * y[order], permutations=0).value == pytest.approx(given, rel=1e-9)


def test_bounds() -> None:
    x, y, _ = oracle.features()
    assert kdx.fss(x, 2 * x).value == pytest.approx(1)
    found = kdx.fss(x, y)
    assert -1 <= found.interval[0] <= found.value <= found.interval[1] <= 1
    assert float(found) == found.value and (found.n, found.batches, found.permutations) == (19, 1, 999)


def test_the_unbiased_estimator_reads_zero_where_the_biased_one_reads_one() -> None:
    """32 images of unrelated features of 4096 dimensions: sd 0.045 for the unbiased estimator."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 4096)), rng.normal(size=(32, 4096))
    assert abs(kdx.fss(x, y, permutations=0).value) < 0.2
    assert kdx.fss(x, y, "biased", permutations=0).value > 0.9


def test_p_values_of_unrelated_features_are_uniform_and_of_related_ones_small() -> None:
    rng = np.random.default_rng(1)
    p_values = [kdx.fss(rng.normal(size=(15, 4)), rng.normal(size=(15, 3)), permutations=99, seed=i).p_value for i in range(120)]
    share = np.mean(np.array(p_values) <= 0.2)
    assert abs(share - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 120)
    x, _, labels = oracle.features()
    assert kdx.rs(x, labels).p_value == pytest.approx(1 / 1000)


def test_the_permutation_p_value_counts_what_direct_permutation_counts() -> None:
    x, y, labels = oracle.features(seed=2, n=13)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = 0.05 * x + noise
    table = scores.permutation_table(13, 60, 7)
    cases: list[tuple[kdx.Score, Callable[[Tensor], kdx.Score]]] = [
        (kdx.fss(x, y, permutations=60, seed=7), lambda p: kdx.fss(x, y[p], permutations=0)),
        (kdx.rs(x, labels, permutations=60, seed=7), lambda p: kdx.rs(x, labels[p], permutations=0)),
        (kdx.rs(x, labels, y, permutations=60, seed=7), lambda p: kdx.rs(x, labels[p], y, permutations=0)),
        (kdx.partial_rs(x, labels, y, permutations=60, seed=7), lambda p: kdx.partial_rs(x, labels[p], y, permutations=0)),
    ]
    for found, again in cases:
        at_least = sum(again(p).value >= found.value - 1e-12 for p in torch.unbind(table))
        assert found.p_value == pytest.approx((1 + at_least) / 61)


def test_p_values_of_many_images_by_classes_are_those_by_pairs() -> None:
    """Past a hundred images a class target is permuted by a product with its classes; an embedding with distinct rows is not."""
    x, _, labels = oracle.features(n=160, classes=5)
    x = x + 30 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(labels).double()
    blurred = one_hot + 1e-9 * torch.randn(one_hot.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_classes, by_pairs = kdx.rs(x, labels, permutations=199), kdx.rs(x, blurred, permutations=199)
    assert by_classes.p_value == by_pairs.p_value and by_classes.value == pytest.approx(by_pairs.value, abs=1e-6)


def test_intervals_cover_the_truth() -> None:
    """Of 95% intervals from 40 images, at least nine in ten hold the score of 4,000 images."""
    rng = np.random.default_rng(2)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.normal(size=(n, 8))
        return x, 0.6 * x + 0.8 * rng.normal(size=(n, 8))

    truth = kdx.fss(*draw(4000), permutations=0).value
    intervals = [kdx.fss(*draw(40), permutations=0).interval for _ in range(100)]
    assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.9
    assert np.mean([high - low for low, high in intervals]) < 0.4


def test_too_few_images_for_an_interval_say_nothing() -> None:
    x, y, _ = oracle.features(n=4, classes=2)
    assert kdx.fss(x, y).interval == (-1.0, 1.0)


def test_bad_input() -> None:
    x, y, labels = oracle.features()
    with pytest.raises(kdx.KdxError, match="at least 4"):
        kdx.fss(x[:3], y[:3])
    with pytest.raises(kdx.KdxError, match="18"):
        kdx.fss(x, y[:-1])
    with pytest.raises(kdx.KdxError, match="constant"):
        kdx.fss(x, torch.zeros_like(y))
    with pytest.raises(kdx.KdxError, match="one class"):
        kdx.rs(x, torch.ones_like(labels))
    with pytest.raises(kdx.KdxError, match="rows 2"):
        kdx.rs(x.index_fill(0, torch.tensor([2]), torch.nan), labels)
    with pytest.raises(kdx.KdxError, match="nothing"):
        kdx.rs(x, labels, 2 * x)
    one_hot = torch.nn.functional.one_hot(labels)
    for given in (one_hot.double(), one_hot.float(), 2.5 * one_hot.double()):
        with pytest.raises(kdx.KdxError, match="target hold nothing"):
            kdx.partial_rs(x, labels, given)
    for wrong in (95, 0.0, 1.0):
        with pytest.raises(ValueError, match="confidence"):
            kdx.fss(x, y, confidence=wrong)
    with pytest.raises(ValueError, match="permutations"):
        kdx.fss(x, y, permutations=-1)
    with pytest.raises(ValueError, match="estimator"):
        kdx.fss(x, y, "unbaised")  # type: ignore[arg-type]
