"""Intervals and p-values: their formulas, their coverage, and their correction for several layers."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

import kdx
from kdx.features.target import Target
from kdx.kernels import geometry, moments
from kdx.scores.pool import Pool
from kdx.scores.score import correlation, estimate, partial, semipartial
from kdx.scores.uncertainty import MANY_BATCHES, Spread, holm, interval, permutation_table, pooled_moments, spread
from tests import oracle


def draw(rng: np.random.Generator, n: int, related: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x = rng.normal(size=(n, 8))
    return x, related * x + rng.normal(size=(n, 8))


def replicates(d: torch.Tensor, biased: bool) -> NDArray[np.float64]:
    """The score of all images except one, for each image, from matrices that are centred again."""
    n = d.shape[-1]
    centred = geometry.double_centered if biased else geometry.u_centered
    kept = [[j for j in range(n) if j != i] for i in range(n)]
    return np.array([float(correlation(geometry.products(centred(d[:, k][:, :, k])))) for k in kept])


@pytest.mark.parametrize("biased", [False, True])
def test_the_variance_is_that_of_the_jackknife_of_the_score(biased: bool) -> None:
    """Leaving images out of the score itself differs only by the curvature of the score, which vanishes with n."""
    x, y = draw(np.random.default_rng(0), 80, 1.0)
    d = torch.stack([geometry.distances(torch.from_numpy(rows)) for rows in (x, y)])
    centred = geometry.double_centered(d) if biased else geometry.u_centered(d)
    known = moments.of_matrices(centred, biased)
    gradient = estimate(correlation, geometry.products(centred)).gradient
    assert known is not None
    jackknife = 79 / 80 * np.square(left := replicates(d, biased) - replicates(d, biased).mean()).sum()
    assert left.shape == (80,)
    assert gradient @ known.variance.numpy() @ gradient == pytest.approx(jackknife, rel=0.05)
    corrected = spread(known, gradient)
    assert corrected is not None and jackknife / 2.1 < corrected.variance < jackknife


@pytest.mark.parametrize("statistic", [correlation, semipartial, partial])
def test_the_gradient_of_a_score_is_its_change_with_the_products(statistic: object) -> None:
    k = 2 if statistic is correlation else 3
    matrices = torch.randn(k, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = matrices @ matrices.T
    gradient = estimate(statistic, products).gradient  # type: ignore[arg-type]
    for place, (a, b) in enumerate(zip(*torch.triu_indices(k, k).tolist(), strict=True)):
        change = torch.zeros(k, k, dtype=torch.float64)
        change[a, b] = change[b, a] = 1e-6
        difference = (statistic(products + change) - statistic(products - change)) / 2e-6  # type: ignore[operator]
        assert gradient[place] == pytest.approx(float(difference), abs=1e-7)


def test_an_interval_without_a_slope_is_students_on_fishers_scale() -> None:
    low, high = interval(0.4, Spread(0.01, 0.0, 30), 0.9, n=100)
    reach = stats.t.ppf(0.95, 29) * 0.1 / (1 - 0.4**2)
    assert (np.arctanh(low), np.arctanh(high)) == pytest.approx((np.arctanh(0.4) - reach, np.arctanh(0.4) + reach))
    low, high = interval(-1.2, Spread(0.01, 0.0, 30), 0.9, n=100, limit=2)  # a difference, on half the scale
    assert low == pytest.approx(2 * np.tanh(np.arctanh(-0.6) - reach / 2 * (1 - 0.4**2) / (1 - 0.6**2)))
    assert -2 < low < -1.2 < high < 2


def test_a_slope_gives_the_interval_of_the_square_root() -> None:
    """Where the variance is proportional to a small value t, sqrt(t) has a constant variance, and its interval is symmetric."""
    value, slope = 0.01, 2e-4
    low, high = interval(value, Spread(slope * value, slope, 100000), 0.95, n=1000)
    reach = 1.959964 * np.sqrt(slope) / 2
    assert (low, high) == pytest.approx(((np.sqrt(value) - reach) ** 2, (np.sqrt(value) + reach) ** 2), rel=1e-3)
    few = interval(value, Spread(slope * value, slope, 100000), 0.95, n=63)
    assert few[0] < low and few[1] == high  # an uncertain slope does not shorten an interval


@pytest.mark.parametrize("value", [-1.0, -0.3, 0.0, 0.99, 1.0])
@pytest.mark.parametrize("slope", [-5.0, 0.0, 5.0])
def test_an_interval_contains_its_value_and_stays_in_range(value: float, slope: float) -> None:
    for limit in (1.0, 2.0):
        for known in (None, Spread(0.0, 0.0, 5), Spread(0.5, slope, 5)):
            low, high = interval(limit * value, known, 0.99, n=40, limit=limit)
            assert -limit <= low <= limit * value + 1e-11 and limit * value - 1e-11 <= high <= limit


def test_a_perfect_score_is_certain() -> None:
    x, _ = draw(np.random.default_rng(0), 40, 1.0)
    assert kdx.fss(x, 3 * x, permutations=0).interval == pytest.approx((1, 1), abs=1e-6)


def test_few_batches_are_judged_by_their_images_and_many_by_their_variation() -> None:
    d = torch.stack([geometry.distances(torch.from_numpy(rows)) for rows in draw(np.random.default_rng(0), 12, 1.0)])
    within = moments.of_matrices(geometry.u_centered(d))
    products = torch.stack([geometry.products(geometry.u_centered(d)) * (1 + 0.1 * i) for i in range(MANY_BATCHES)])
    few, many = pooled_moments(products[:-1], [within] * (MANY_BATCHES - 1)), pooled_moments(products, [within] * MANY_BATCHES)
    assert within is not None and few is not None and many is not None
    assert few.parts == 12 * (MANY_BATCHES - 1) and oracle.error(few.variance, (MANY_BATCHES - 1) * within.variance) < 1e-12
    assert many.parts == MANY_BATCHES and oracle.error(many.variance, moments.of_batches(products).variance) < 1e-12
    old = pooled_moments(products[:3], [within, None, within])  # an older kdx stored the second batch
    assert old is not None and old.parts == 3
    assert pooled_moments(products[:1], [None]) is None


def test_the_width_of_an_interval_does_not_depend_on_the_number_of_batches() -> None:
    """108 images in one set and in two batches. Leaving out one of two batches gave (-0.83, 0.92) for a score of 0.19."""
    x, y = draw(np.random.default_rng(1), 108, 1.0)
    whole = kdx.fss(x, y, permutations=0)
    widths = []
    for seed in range(5):
        score = kdx.fss(x, y, batch=54, permutations=0, seed=seed)
        assert score.batches == 2
        widths.append(score.interval[1] - score.interval[0])
    assert widths == pytest.approx([whole.interval[1] - whole.interval[0]] * 5, rel=0.25)


@pytest.mark.slow
def test_intervals_have_their_level_near_zero_and_away_from_it() -> None:
    """Unrelated and related features. The jackknife without the correction for interactions has 93% where 80% are stated."""
    rng = np.random.default_rng(2)
    for related, truth in ((0.0, 0.0), (0.75, None)):
        x, y = draw(rng, 3000, related)
        truth = kdx.fss(x, y, permutations=0).value if truth is None else truth
        scores = [kdx.fss(*draw(rng, 64, related), permutations=0, confidence=0.8) for _ in range(250)]
        covered = np.mean([score.interval[0] <= truth <= score.interval[1] for score in scores])
        assert abs(covered - 0.8) < 3.5 * np.sqrt(0.8 * 0.2 / 250)


def test_adjusted_p_values_are_those_of_the_closed_test() -> None:
    """Holm's method is the closed test of Bonferroni's: a hypothesis is rejected if each set that contains it is rejected."""
    rng = np.random.default_rng(0)
    for m in (1, 2, 5, 7):
        p = np.round(rng.random(m) ** 3, 2)  # with ties
        sets = list(chain.from_iterable(combinations(range(m), size) for size in range(1, m + 1)))
        expected = [max(min(1.0, len(s) * p[list(s)].min()) for s in sets if i in s) for i in range(m)]
        assert holm(p.tolist()) == pytest.approx(expected)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


def test_every_score_is_adjusted_over_the_layers() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    student = np.eye(4)[labels] + 0.7 * rng.normal(size=(40, 4))
    features = {f"layer{i}": {"student": student + i * rng.normal(size=(40, 4)), "base": rng.normal(size=(40, 6))} for i in range(3)}
    layers = kdx.compare(features, labels, permutations=199)
    for name in ("RS(S)", "RS(B)", "RS(S|B)"):
        p_values = [layer.scores[name].p_value for layer in layers.values()]
        assert [layer.scores[name].p_adjusted for layer in layers.values()] == pytest.approx(holm([p for p in p_values if p is not None]))
    assert layers["layer0"].scores["RS(S)"].p_adjusted == pytest.approx(3 / 200)
    plain = kdx.compare(features, labels, permutations=0)["layer0"].scores["RS(S)"]
    assert plain.p_value is None and plain.p_adjusted is None


@pytest.mark.slow
def test_p_values_are_uniform_under_the_null() -> None:
    """Each p-value of FSS, RS and RS(X|Y) is uniform on 1/20, ..., 1 where the features have nothing to do with the permuted matrix.

    Small sets, sorted by class as in a folder of folders; the given features are related to the explained ones.
    """
    rng = np.random.default_rng(5)
    p_values = []
    for i in range(600):
        n, options = int(rng.integers(8, 20)), {"permutations": 19, "seed": i}
        x, y = draw(rng, n, 1.0)
        labels = np.sort(rng.integers(0, 3, n)) if i % 2 else np.arange(n) % 2
        labels[:3] = 0, 0, 1
        scores = (
            kdx.fss(x, rng.normal(size=(n, 3)), **options),  # type: ignore[arg-type]
            kdx.rs(x, labels, **options),  # type: ignore[arg-type]
            kdx.rs(x, labels, y, **options),  # type: ignore[arg-type]
            kdx.partial_rs(x, labels, y, **options),  # type: ignore[arg-type]
            kdx.rs(x, rng.normal(size=(n, 2)), batch=n // 2, **options),  # type: ignore[arg-type]
        )
        p_values.append([score.p_value for score in scores])
    for column in np.array(p_values).T:
        counts = np.bincount(np.round(20 * column).astype(int), minlength=21)[1:]
        assert counts.sum() == 600 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.slow
def test_permuted_products_of_a_pool_give_uniform_p_values() -> None:
    """Scores over the batches of a run: the share of p-values up to 0.2 is 0.2 for unrelated features."""
    rng = np.random.default_rng(6)
    target = Target.of(torch.arange(16) % 4)
    small = 0
    for i in range(150):
        pool = Pool(["student", "base"])
        for batch in range(3):
            d = torch.stack([geometry.distances(torch.from_numpy(rng.normal(size=(16, 3)))) for _ in range(2)] + [target.distances.raw])
            matrices = geometry.u_centered(d)
            permuted = geometry.permuted_products(matrices, matrices[2], permutation_table(16, 19, (i, batch)))
            pool.add(geometry.products(matrices), {"target": permuted}, moments.of_matrices(matrices))
        p_value = pool.scores(n=48).scores["RS(S)"].p_value
        assert p_value is not None
        small += p_value <= 0.2
    assert abs(small / 150 - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 150)
