"""kdx.fss, kdx.rs and kdx.partial_rs: their values, intervals and p-values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dcor
import numpy as np
import pytest
import torch
from torch import Tensor

import kdx
from kdx.features.rows import rows_of
from kdx.features.target import Target
from kdx.kernels import geometry
from kdx.scores import inner_products, uncertainty
from kdx.scores.score import correlation
from tests import oracle


@pytest.mark.parametrize("case", oracle.CASES)
def test_published_numbers(case: str) -> None:
    known = oracle.load(case)
    x, y, target = known["x"], known["y"], known["target"]
    for score, key in (
        (kdx.fss(x, y, permutations=9), "dcor_unbiased_xy"),
        (kdx.fss(x, y, "biased", permutations=9), "dcor_library_biased_xy"),
        (kdx.rs(x, target, permutations=9), "dcor_unbiased_xg"),
        (kdx.rs(x, target, y, permutations=9), "semipartial_xg_given_y"),
        (kdx.rs(y, target, x, permutations=9), "semipartial_yg_given_x"),
        (kdx.partial_rs(x, target, y, permutations=9), "dcor_library_partial_xg_given_y"),
    ):
        assert score.value == pytest.approx(float(known[key]), rel=1e-9), key
    directions = kdx.fss(x, y, "biased", unit_length=True, permutations=0).value
    assert directions == pytest.approx(float(known["dcor_biased_normalized_xy"]), rel=1e-5)  # the authors' code adds small constants


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", oracle.CASES)
def test_published_numbers_from_narrow_features(case: str, dtype: torch.dtype) -> None:
    known = oracle.load(case)
    x, y = (torch.from_numpy(known[key]).to(dtype) for key in ("x", "y"))
    score = kdx.fss(x, y, permutations=0).value
    assert abs(score - float(known["dcor_unbiased_xy"])) < oracle.TOLERANCE[str(dtype).removeprefix("torch.")]


def test_the_partial_score_equals_dcors_on_random_data() -> None:
    rng = np.random.default_rng(5)
    x, y, z = rng.normal(size=(29, 7)), rng.normal(size=(29, 3)), rng.normal(size=(29, 2))
    assert kdx.partial_rs(x, y, z, permutations=0).value == pytest.approx(dcor.partial_distance_correlation(x, y, z), rel=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.slow
def test_every_estimator_equals_dcors_at_a_thousand_images(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(6)
    x, labels = rng.normal(size=(1000, 64)), rng.integers(0, 6, 1000)
    x[:, :6] += np.eye(6)[labels]
    y = x @ rng.normal(size=(64, 64)) / 16 + rng.normal(size=(1000, 64))
    g, narrow = np.eye(6)[labels], (torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype))
    a, b, c = (dcor.u_centered(dcor.distances.pairwise_distances(rows)) for rows in (x, y, g))
    residual = a - (a * b).sum() / (b * b).sum() * b
    for score, expected in (
        (kdx.fss(*narrow, permutations=0), dcor.u_distance_correlation_sqr(x, y)),
        (kdx.fss(*narrow, "biased", permutations=0), dcor.distance_correlation_sqr(x, y)),
        (kdx.rs(narrow[0], labels, permutations=0), dcor.u_distance_correlation_sqr(x, g)),
        (kdx.rs(narrow[0], labels, estimator="biased", permutations=0), dcor.distance_correlation_sqr(x, g)),
        (kdx.rs(narrow[0], labels, narrow[1], permutations=0), (residual * c).sum() / np.sqrt((residual**2).sum() * (c**2).sum())),
        (kdx.partial_rs(narrow[0], labels, narrow[1], permutations=0), dcor.partial_distance_correlation(x, g, y)),
    ):
        assert score.value == pytest.approx(float(expected), abs=tolerance)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_scale_rotation_shift_and_order_change_nothing(estimator: str) -> None:
    x, y, labels = oracle.features()
    rotation = torch.linalg.qr(torch.randn(165, 165, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1))
    plain = kdx.fss(x, y, estimator, permutations=0).value  # type: ignore[arg-type]
    turned = 1e-4 * x.flatten(1) @ rotation + 17
    assert kdx.fss(turned, y, estimator, permutations=0).value == pytest.approx(plain, rel=1e-9)  # type: ignore[arg-type]
    assert kdx.fss(y[order], turned[order], estimator, permutations=0).value == pytest.approx(plain, rel=1e-9)  # type: ignore[arg-type]
    conditional = kdx.rs(x, labels, y, permutations=0).value
    assert kdx.rs(turned[order], labels[order], -3 * y[order], permutations=0).value == pytest.approx(conditional, rel=1e-9)


def test_unit_length_compares_directions(tmp_path: Path) -> None:
    x, y, _ = oracle.features(n=300)
    lengths = torch.rand(300, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    x[7] = 0
    expected = kdx.fss(torch.nn.functional.normalize(x.flatten(1)), torch.nn.functional.normalize(y.flatten(1)), permutations=0).value
    np.save(tmp_path / "x.npy", (lengths * x).numpy())
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    for source in (x, lengths * x, 1e-200 * x, on_disk):
        assert kdx.fss(source, y if source is not on_disk else y.numpy(), unit_length=True, permutations=0).value == pytest.approx(expected)


def test_bounds() -> None:
    x, y, _ = oracle.features()
    assert kdx.fss(x, 2 * x).value == pytest.approx(1)
    score = kdx.fss(x, y)
    assert -1 <= score.interval[0] <= score.value <= score.interval[1] <= 1
    assert float(score) == score.value and (score.n, score.batches, score.permutations) == (19, 1, 999)


def test_the_unbiased_estimator_is_zero_where_the_biased_one_is_one() -> None:
    """Unrelated features of 32 images with 4096 dimensions. The unbiased estimator has a standard deviation of 0.045."""
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


def test_p_values_equal_those_of_direct_permutation() -> None:
    x, y, labels = oracle.features(seed=2, n=13)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = 0.05 * x + noise
    table = uncertainty.permutation_table(13, 60, 7)
    cases: list[tuple[kdx.Score, Callable[[Tensor], kdx.Score]]] = [
        (kdx.fss(x, y, permutations=60, seed=7), lambda p: kdx.fss(x, y[p], permutations=0)),
        (kdx.rs(x, labels, permutations=60, seed=7), lambda p: kdx.rs(x, labels[p], permutations=0)),
        (kdx.rs(x, labels, y, permutations=60, seed=7), lambda p: kdx.rs(x, labels[p], y, permutations=0)),
        (kdx.partial_rs(x, labels, y, permutations=60, seed=7), lambda p: kdx.partial_rs(x, labels[p], y, permutations=0)),
    ]
    for score, again in cases:
        at_least = sum(again(p).value >= score.value - 1e-12 for p in torch.unbind(table))
        assert score.p_value == pytest.approx((1 + at_least) / 61)


def test_p_values_of_many_images_by_classes_equal_those_by_rows() -> None:
    """Above 256 images, labels and almost equal one-hot rows, of which no two are the same, have the same p-value."""
    x, _, labels = oracle.features(n=270, classes=5)
    x = x + 30 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(labels).double()
    blurred = one_hot + 1e-9 * torch.randn(one_hot.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_classes, by_pairs = kdx.rs(x, labels, permutations=199), kdx.rs(x, blurred, permutations=199)
    assert by_classes.p_value == by_pairs.p_value and by_classes.value == pytest.approx(by_pairs.value, abs=1e-6)


@pytest.mark.parametrize("labels", [True, False])
def test_products_of_a_permuted_target_of_classes_are_those_of_its_matrix(labels: bool) -> None:
    """Above 256 images, the classes take the place of a pass over all pairs."""
    x, _, classes = oracle.features(n=300, classes=5)
    embedding = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[classes]
    target, table = Target.of(classes if labels else embedding), uncertainty.permutation_table(300, 20, 0)
    matrices = torch.stack([geometry.u_centered(geometry.distances(x.flatten(1))), target.distances.centred])
    expected = geometry.permuted_products(matrices, target.distances.centred, table)
    assert oracle.error(uncertainty.permuted_target_products(matrices, target, table), expected) < 1e-12
    assert uncertainty.permuted_target_products(matrices, target, table[:0]).shape == (0, 2)


@pytest.mark.slow
def test_p_values_of_many_unrelated_images_are_uniform() -> None:
    """In tiles and in batches, where permutations rotate parts of the images. The images are sorted by class, as in a folder of folders."""
    rng = np.random.default_rng(3)
    labels = np.sort(rng.integers(0, 5, 260))
    p_values = []
    for i in range(60):
        x, y = rng.normal(size=(260, 4)), rng.normal(size=(260, 3))
        p_values += [kdx.fss(x, y, permutations=99, seed=i).p_value, kdx.rs(x, labels, permutations=99, seed=i).p_value]
        p_values += [kdx.fss(x, y, permutations=99, seed=i, batch=26).p_value, kdx.rs(x, labels, batch=52, permutations=99, seed=i).p_value]
    for quarter in np.array(p_values).reshape(-1, 4).T:
        assert abs(np.mean(quarter <= 0.2) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 60)
    related = rng.normal(size=(260, 4)) + np.eye(5)[labels][:, :4]
    assert kdx.rs(related, labels).p_value == kdx.rs(related, labels, batch=52).p_value == 0.001


def test_rotated_tiles_have_the_null_distribution_of_permutations() -> None:
    """256 images are permuted directly, 257 in tiles: the null distributions agree."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(257, 6)), rng.normal(size=(257, 5))
    spread = []
    for n in (256, 257):
        named = {"x": rows_of(x[:n], "x"), "y": rows_of(y[:n], "y")}
        sums = inner_products.inner_products(named, ["y"], inner_products.Sampling(permutations=1999))
        values = correlation(uncertainty.with_permuted(sums.products, 1, sums.permuted["y"]))
        spread.append([float(values.mean()), float(values.std())])
    assert abs(spread[0][0] - spread[1][0]) < 0.2 * spread[0][1]
    assert spread[1][1] == pytest.approx(spread[0][1], rel=0.1)


def test_scores_in_tiles_continue_those_of_matrices_of_all_pairs() -> None:
    """The 257th image changes the implementation, but the scores only a little."""
    x, y, labels = oracle.features(n=257)
    pairs = [
        (kdx.rs(x[:256], labels[:256], y[:256], permutations=99), kdx.rs(x, labels, y, permutations=99)),
        (kdx.fss(x[:256], y[:256], permutations=99), kdx.fss(x, y, permutations=99)),
    ]
    for small, tiled in pairs:
        assert tiled.value == pytest.approx(small.value, abs=0.01)
        assert tiled.interval == pytest.approx(small.interval, abs=0.03)
        assert tiled.p_value == small.p_value


def test_batches_are_pooled() -> None:
    """A score over batches is one ratio of summed inner products."""
    x, _, labels = oracle.features(n=60)
    score = kdx.rs(x, labels, batch=20, permutations=0, seed=2)
    shuffled = torch.from_numpy(np.random.default_rng(2).permutation(60))
    products = []
    for part in (shuffled[start::3] for start in range(3)):
        d = torch.stack([geometry.distances(x[part].flatten(1)), geometry.distances(torch.nn.functional.one_hot(labels).double()[part])])
        products.append(geometry.products(geometry.u_centered(d)))
    assert score.value == pytest.approx(float(correlation(torch.stack(products).sum(0))), rel=1e-9)
    assert (score.n, score.batches) == (60, 3)
    assert kdx.rs(x, labels, batch=60) == kdx.rs(x, labels)


def test_batches_of_many_classes_or_a_rare_class_are_not_biased() -> None:
    """Batches are drawn without regard to classes. Batches without two images of one class add zero and are not refused."""
    rng = np.random.default_rng(5)
    for labels in (rng.integers(0, 100, 480), (rng.random(480) < 0.05).astype(int), np.sort(rng.integers(0, 2, 480))):
        x = rng.normal(size=(480, 6)) + 2 * rng.normal(size=(100, 6))[labels]
        whole = kdx.rs(x, labels, permutations=0).value
        pooled = [kdx.rs(x, labels, batch=8, permutations=0, seed=seed).value for seed in range(30)]
        assert abs(np.mean(pooled) - whole) < 4 * np.std(pooled) / 30**0.5 + 0.02
    assert kdx.rs(x, rng.normal(size=(480, 3)), batch=32).p_value is not None


def test_too_few_images_have_the_whole_range_as_interval() -> None:
    x, y, _ = oracle.features(n=4, classes=2)
    assert kdx.fss(x, y).interval == (-1.0, 1.0)


def test_bad_input() -> None:
    x, y, labels = oracle.features()
    with pytest.raises(kdx.KdxError, match="at least 4"):
        kdx.fss(x[:3], y[:3])
    with pytest.raises(kdx.KdxError, match="18"):
        kdx.fss(x, y[:-1])
    with pytest.raises(kdx.KdxError, match=r"float64.*float32"):
        kdx.fss(x, y.float())
    with pytest.raises(kdx.KdxError, match=r"cpu.*meta"):
        kdx.fss(x, y.to("meta"))
    with pytest.raises(kdx.KdxError, match="constant"):
        kdx.fss(x, torch.zeros_like(y))
    with pytest.raises(kdx.KdxError, match="one class"):
        kdx.rs(x, torch.ones_like(labels))
    with pytest.raises(kdx.KdxError, match="rows 2"):
        kdx.rs(x.index_fill(0, torch.tensor([2]), torch.nan), labels)
    with pytest.raises(kdx.KdxError, match="Nothing is left"):
        kdx.rs(x, labels, 2 * x)
    one_hot = torch.nn.functional.one_hot(labels)
    for given in (one_hot.double(), one_hot.float(), 2.5 * one_hot.double()):
        with pytest.raises(kdx.KdxError, match="left of the target"):
            kdx.partial_rs(x.to(given.dtype), labels, given)
    for wrong in (95, 0.0, 1.0):
        with pytest.raises(ValueError, match="confidence"):
            kdx.fss(x, y, confidence=wrong)
    with pytest.raises(ValueError, match="permutations"):
        kdx.fss(x, y, permutations=-1)
    with pytest.raises(kdx.KdxError, match="rows 5"):
        kdx.rs(torch.randn(300, 3), torch.randn(300, 2).index_fill(0, torch.tensor([5]), torch.nan))
    with pytest.raises(kdx.KdxError, match="shape"):
        kdx.rs(x, torch.zeros(19, 0))
    with pytest.raises(kdx.KdxError, match="2000 x 2000"):
        kdx.fss(torch.randn(2500, 3), torch.randn(2500, 3), batch=2000)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed"):
            kdx.fss(x, y, seed=seed)
    with pytest.raises(kdx.KdxError, match="2 rows of labels or class embeddings"):
        kdx.rs(x, [0, 1])
    many, few = torch.randn(600, 3), torch.randn(600, 3)
    many[[7, 500]] = torch.nan
    with pytest.raises(kdx.KdxError, match="rows 7, 500"):
        kdx.fss(few, many)
    with pytest.raises(kdx.KdxError, match="too large"):
        kdx.fss(x, 1e60 * x)
    with pytest.raises(kdx.KdxError, match="constant"):
        kdx.fss(few, torch.ones(600, 2))
    with pytest.raises(kdx.KdxError, match="one class"):
        kdx.rs(few, torch.zeros(600, dtype=torch.int64))
    with pytest.raises(kdx.KdxError, match="one class"):
        kdx.rs(few, torch.arange(600))
    with pytest.raises(kdx.KdxError, match="left of the features"):
        kdx.rs(few, torch.arange(600) % 3, 2 * few)
    with pytest.raises(ValueError, match="estimator"):
        kdx.fss(x, y, "unbaised")  # type: ignore[arg-type]
