"""The four maps and nine scores of a layer against kdx.unicam, kdx.fss and kdx.rs; pooling over batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdx
from kdx.data.batches import random_batches
from kdx.explain.layer import LayerMeasurement, measure, measure_distances
from kdx.features import arrays
from kdx.features.target import Target
from kdx.kernels.moments import Moments
from kdx.roles import CONTRASTS, MAPS, MEASURED, ROLES, SCORES, contrasts_among, maps_among, roles_among, scores_among
from kdx.scores import uncertainty
from kdx.scores.pool import Pool, pooled_scores
from tests import oracle


def roles(n: int = 24, seed: int = 0, classes: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """The features of three networks: the student's are the base's plus a mixture of the teacher's."""
    teacher, base, labels = oracle.features(seed, n=n, shape=(7, 5, 3), other=(9, 4, 4), classes=classes)
    generator = torch.Generator().manual_seed(seed + 1)
    mixing = torch.randn(teacher[0].numel(), base[0].numel(), generator=generator, dtype=torch.float64) / 5
    student = base + (teacher.flatten(1) @ mixing).reshape(base.shape)
    return {"teacher": teacher, "student": student, "base": base}, labels


def measured(n: int = 24, seed: int = 0, permutations: int = 49) -> tuple[dict[str, Tensor], Tensor, LayerMeasurement]:
    features, labels = roles(n, seed)
    return features, labels, measure(features, Target.of(labels), permutations=uncertainty.permutation_table(n, permutations, 0))


def test_maps_equal_those_of_unicam() -> None:
    features, labels, measurement = measured()
    for name, explained, given in (
        ("distilled", "student", "base"),
        ("residual", "base", "student"),
        ("missed", "teacher", "student"),
        ("new", "student", "teacher"),
    ):
        expected = kdx.unicam(features[explained], features[given], labels)
        assert oracle.error(measurement.maps[name].maps, expected.maps) < 1e-12
        assert oracle.error(measurement.maps[name].weights, expected.weights) < 1e-12
        assert measurement.maps[name].score == pytest.approx(expected.score, rel=1e-12)


def test_scores_equal_fss_and_rs_with_intervals_and_p_values() -> None:
    f, labels, measurement = measured()
    t, s, b = f["teacher"], f["student"], f["base"]
    pooled = pooled_scores(measurement.products, measurement.permuted, measurement.moments, n=24)
    expected = {
        "RS(T)": kdx.rs(t, labels, permutations=49),
        "RS(S)": kdx.rs(s, labels, permutations=49),
        "RS(B)": kdx.rs(b, labels, permutations=49),
        "RS(S|B)": kdx.rs(s, labels, b, permutations=49),
        "RS(B|S)": kdx.rs(b, labels, s, permutations=49),
        "RS(T|S)": kdx.rs(t, labels, s, permutations=49),
        "RS(S|T)": kdx.rs(s, labels, t, permutations=49),
        "FSS(S,T)": kdx.fss(s, t, permutations=49),
        "FSS(B,T)": kdx.fss(b, t, permutations=49),
    }
    assert set(pooled.scores) == set(expected)
    for name, score in expected.items():
        assert pooled.scores[name].value == pytest.approx(score.value, rel=1e-10), name
        assert pooled.scores[name].interval == pytest.approx(score.interval, rel=1e-8), name
        assert pooled.scores[name].p_value == score.p_value, name
    difference, (low, high) = pooled.contrasts["FSS(S,T) - FSS(B,T)"]
    assert difference == pytest.approx(expected["FSS(S,T)"].value - expected["FSS(B,T)"].value)
    assert low < difference < high


def test_pooling_is_one_ratio_of_summed_products() -> None:
    batches = [measured(20, seed)[2] for seed in range(5)]
    pool = Pool()
    for m in batches:
        pool.add(m.products, m.permuted, m.moments)
    pooled = pool.scores(n=100)
    products = sum(m.products for m in batches)
    assert isinstance(products, Tensor)
    score = pooled.scores["FSS(S,T)"]
    assert score.value == pytest.approx(float(products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()))
    assert (score.n, score.batches) == (100, 5)
    # Few batches: the moments within them add up, so the interval is that of a sum of independent sets.
    moments = [m.moments for m in batches if m.moments is not None]
    variance = torch.stack([m.variance for m in moments]).sum(0)
    assert moments[0].parts == 20 and sum(m.parts for m in moments) == 100
    gradient = torch.autograd.functional.jacobian(lambda p: p[1] / (p[0] * p[4]).sqrt(), products[*torch.triu_indices(4, 4)])
    interaction = torch.stack([m.interaction for m in moments]).sum(0)
    error = gradient @ variance @ gradient - min(gradient @ interaction @ gradient, gradient @ variance @ gradient / 2)
    z = [math.atanh(end) for end in score.interval]
    reach = 1.9842169 * float(error.sqrt()) / (1 - score.value**2)
    assert z[1] - z[0] == pytest.approx(2 * reach, rel=0.05)


@pytest.mark.slow
def test_pooled_scores_over_the_batches_of_a_run_converge_to_those_of_the_whole_set() -> None:
    """480 images of eight classes in batches of 16: over six plans, most intervals contain the scores of the whole set."""
    features, labels = roles(480, classes=8)
    whole = pooled_scores(*_parts(features, labels, torch.arange(480)), n=480)
    covered = []
    for seed in range(6):
        pool = Pool()
        for batch in random_batches(labels.numpy(), 16, seed):
            pool.add(*_parts(features, labels, torch.from_numpy(batch)))
        pooled = pool.scores(n=480)
        for name, score in whole.scores.items():
            low, high = pooled.scores[name].interval
            covered.append(low <= score.value <= high)
            assert high - low < 0.3, name
    assert sum(covered) >= 0.85 * len(covered)


def _parts(features: dict[str, Tensor], labels: Tensor, part: Tensor) -> tuple[Tensor, dict[str, Tensor], Moments | None]:
    measurement = measure(
        {role: value[part] for role, value in features.items()},
        Target.of(labels[part]),
        permutations=uncertainty.permutation_table(len(part), 9, 0),
    )
    return measurement.products, measurement.permuted, measurement.moments


def test_without_permutations_there_is_no_p_value() -> None:
    _, _, measurement = measured(permutations=0)
    assert pooled_scores(measurement.products, measurement.permuted, measurement.moments, n=24).scores["RS(S)"].p_value is None


@pytest.mark.parametrize("teacher", [True, False])
def test_distances_alone_give_the_scores(teacher: bool) -> None:
    features, labels = roles()
    if not teacher:
        del features["teacher"]
    target, permutations = Target.of(labels), uncertainty.permutation_table(24, 49, 0)
    expected = measure(features, target, permutations=permutations)
    distances = {role: torch.cdist(x.flatten(1), x.flatten(1)) for role, x in features.items()}
    products, permuted, moments = measure_distances(distances, target, permutations)
    assert oracle.error(products, expected.products) < 1e-12
    assert permuted.keys() == expected.permuted.keys() == ({"teacher", "target"} if teacher else {"target"})
    for name, rows in permuted.items():
        assert oracle.error(rows, expected.permuted[name]) < 1e-12
    assert moments is not None and expected.moments is not None
    assert oracle.error(moments.variance, expected.moments.variance) < 1e-10


def test_maps_use_the_features_and_products_use_the_distances() -> None:
    (features, labels), (others, _) = roles(), roles(seed=5)
    target, permutations = Target.of(labels), uncertainty.permutation_table(24, 49, 0)
    maps = measure(features, target, permutations=permutations).maps
    expected = measure(others, target, permutations=permutations)
    distances = {role: torch.cdist(x.flatten(1), x.flatten(1)) for role, x in others.items()}
    measured = arrays.checked_distances(torch.stack([*distances.values()]), distances)
    measurement = measure(features, target, permutations=permutations, distances={role: measured[i] for i, role in enumerate(distances)})
    assert all(torch.equal(measurement.maps[name].maps, maps[name].maps) for name in maps)
    assert oracle.error(measurement.products, expected.products) < 1e-12
    assert all(oracle.error(measurement.permuted[name], rows) < 1e-12 for name, rows in expected.permuted.items())
    assert measurement.moments is not None and expected.moments is not None
    assert oracle.error(measurement.moments.variance, expected.moments.variance) < 1e-10


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d * float("nan"), "base's features are not finite"),
        (lambda d: 1 - torch.eye(len(d)), "base's features are constant"),
        (lambda d: d[1:, 1:], "23 rows of the base's distances and 24"),
        (None, "Nothing is left of the explained features"),
    ],
)
def test_distances_without_scores_are_refused(spoil: Callable[[Tensor], Tensor] | None, message: str) -> None:
    features, labels = roles()
    distances = {role: torch.cdist(x.flatten(1), x.flatten(1)).float() for role, x in features.items()}
    distances["base"] = spoil(distances["base"]) if spoil else 2 * distances["student"]
    with pytest.raises(kdx.KdxError, match=message):
        measure_distances(distances, Target.of(labels), uncertainty.permutation_table(24, 0, 0))


def test_without_a_teacher_the_other_results_stay_the_same() -> None:
    features, labels, whole = measured()
    del features["teacher"]
    measurement = measure(features, Target.of(labels), permutations=uncertainty.permutation_table(24, 49, 0))
    assert list(measurement.maps) == ["distilled", "residual"]
    for name, maps in measurement.maps.items():
        assert oracle.error(maps.maps, whole.maps[name].maps) < 1e-12
    expected = pooled_scores(whole.products, whole.permuted, whole.moments, n=24)
    pool = Pool(features)
    pool.add(measurement.products, measurement.permuted, measurement.moments)
    pooled = pool.scores(n=24)
    assert list(pooled.scores) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"]
    for name, score in pooled.scores.items():
        assert score.value == pytest.approx(expected.scores[name].value, abs=1e-12)
        assert score.interval == pytest.approx(expected.scores[name].interval, abs=1e-10)
        assert score.p_value == expected.scores[name].p_value
    assert list(pooled.contrasts) == ["RS(S|B) - RS(B|S)", "RS(S) - RS(B)"]


def test_tables_for_all_roles_are_complete() -> None:
    assert (
        maps_among(ROLES) == {name: (kind.explained, kind.given) for name, kind in MAPS.items() if kind.given}
        and scores_among(MEASURED) == SCORES
    )
    assert contrasts_among(MEASURED) == CONTRASTS
    assert roles_among({"base": 0, "teacher": 0, "student": 0}) == ROLES
    for present in ({"teacher", "base"}, {"student", "base", "tutor"}, set[str]()):
        with pytest.raises(ValueError, match="student and optionally base and teacher"):
            roles_among(present)


def test_equal_networks_are_refused() -> None:
    features, labels = roles()
    with pytest.raises(kdx.KdxError, match="Nothing is left"):
        measure(features | {"student": features["base"]}, Target.of(labels), permutations=uncertainty.permutation_table(24, 0, 0))
