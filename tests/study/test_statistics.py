"""The statistics of a study: intervals and tests against scipy's, Holm's correction by hand, and what is claimed where nothing is true."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

import kdx
from kdx.kernels.distances import distances
from kdx.kernels.geometry import u_centered
from kdx.roles import BALANCE, LIKENESS, TARGET, contrast_name, contrasts_among, scores_among
from kdx.scores.score import STATISTICS
from kdx.study.statistics import ACCURACY, ACCURACY_GAIN, Comparison, Group, StudyStatistics, detectable, over_seeds, study_statistics
from kdx.study.table import Cell, Measurement, Study

PARAMETERS = {("d", "small"): 1000, ("d", "large"): 4000}


def cell(teacher: str, method: str, seed: int, assistants: tuple[str, ...] = ()) -> Cell:
    name = f"d/{'+'.join((teacher, *assistants))}/tiny/{method}/seed{seed}"
    return Cell("d", teacher, assistants, "tiny", method, seed, name, name)


def study(numbers: Mapping[Cell, Mapping[tuple[str, str], float]]) -> Study:
    measurements = (
        Measurement(each.key, layer, score, value, value - 0.1, value + 0.2, 40)
        for each, values in numbers.items()
        for (layer, score), value in values.items()
    )
    return Study({}, tuple(numbers), tuple(measurements))


def random_study(
    seeds: Iterable[int] = range(5), teachers: Sequence[str] = ("small", "large"), methods: Sequence[str] = ("kd", "at")
) -> Study:
    """Two layers with the scores that the tests need."""
    rng = np.random.default_rng(0)
    names = [("", ACCURACY), ("", "accuracy(base)"), *product(("l1", "l2"), ("FSS(S,T)", "FSS(B,T)", "RS(S)", LIKENESS, BALANCE))]
    chains = [*((teacher, ()) for teacher in teachers), ("large", ("middle",))]
    cells = [cell(teacher, method, seed, above) for (teacher, above), method, seed in product(chains, methods, seeds)]
    return study({each: {name: float(rng.normal(0.4, 0.1)) for name in names} for each in cells})


def values_of(of: Study, group: Group, name: tuple[str, str]) -> list[float]:
    keys = [each.key for each in of.cells if Group.of(each) == group]
    return [m.value for m in of.measurements if m.cell in keys and (m.layer, m.score) == name]


def comparison(statistics: StudyStatistics, question: str, subject: str, layer: str, score: str) -> Comparison:
    (one,) = [
        each
        for each in statistics.comparisons
        if (each.question, each.subject, each.layer, each.score) == (question, subject, layer, score)
    ]
    return one


KD_SMALL, KD_LARGE = (Group("d", teacher, (), "tiny", "kd") for teacher in ("small", "large"))
AT_LARGE, ASSISTED = replace(KD_LARGE, method="at"), replace(KD_LARGE, assistants=("middle",))


@pytest.mark.parametrize("confidence", [0.95, 0.9])
def test_intervals_and_tests_are_those_of_students_t(confidence: float) -> None:
    of = random_study()
    statistics = study_statistics(of, PARAMETERS, confidence)
    for name in (("l1", "FSS(S,T)"), ("", ACCURACY), ("l2", LIKENESS)):
        values, estimate = values_of(of, KD_LARGE, name), statistics.estimates[KD_LARGE][name]
        expected = stats.t.interval(confidence, 4, np.mean(values), stats.sem(values))
        assert estimate.interval == pytest.approx(expected) and estimate.value == pytest.approx(np.mean(values))
        assert estimate.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue) and estimate.over_seeds

    def check(one: Comparison, more: list[float], less: list[float]) -> None:
        test = stats.ttest_rel(more, less)
        assert one.estimate.p_value == pytest.approx(test.pvalue)
        assert one.estimate.interval == pytest.approx(tuple(test.confidence_interval(confidence)))

    name = ("l1", "FSS(S,T)")
    kd, at, assisted = (values_of(of, group, name) for group in (KD_LARGE, AT_LARGE, ASSISTED))
    check(comparison(statistics, "methods", "at minus kd, large → tiny", *name), at, kd)
    check(comparison(statistics, "assistant", "large → middle → tiny minus large → tiny, kd", *name), assisted, kd)
    # With two teachers, the slope per doubling of the parameters is their difference over the number of doublings.
    small = values_of(of, KD_SMALL, name)
    gap = comparison(statistics, "capacity", "tiny, kd: per doubling of the teacher", *name)
    check(gap, [x / 2 for x in kd], [x / 2 for x in small])
    gain = np.subtract(values_of(of, KD_LARGE, ("", ACCURACY)), values_of(of, KD_LARGE, ("", "accuracy(base)")))
    assert statistics.estimates[KD_LARGE]["", ACCURACY_GAIN].value == pytest.approx(gain.mean())


def test_the_slope_over_three_teachers_is_that_of_least_squares() -> None:
    sizes = {"small": 1000, "large": 4000, "huge": 10_000}
    of = random_study(teachers=tuple(sizes))
    name = ("l2", "FSS(S,T)")
    by_teacher = [values_of(of, Group("d", teacher, (), "tiny", "kd"), name) for teacher in sizes]
    slopes = [stats.linregress(np.log2([*sizes.values()]), column).slope for column in np.transpose(by_teacher)]
    statistics = study_statistics(of, {("d", teacher): size for teacher, size in sizes.items()})
    one = comparison(statistics, "capacity", "tiny, kd: per doubling of the teacher", *name)
    assert one.estimate.value == pytest.approx(np.mean(slopes)) and one.estimate.p_value == pytest.approx(
        stats.ttest_1samp(slopes, 0).pvalue
    )
    without = study_statistics(of, {("d", "small"): 1000, ("d", "large"): 4000})
    assert not [each for each in without.comparisons if each.question == "capacity"]


def test_holm_is_over_all_tests_of_the_study() -> None:
    comparisons = study_statistics(random_study(), PARAMETERS).comparisons
    # Per group and layer two claims; per method one slope of 3 names; per method one assistant; per chain one pair of methods and 5 names.
    assert Counter(one.question for one in comparisons) == {"likeness": 12, "balance": 12, "capacity": 6, "assistant": 6, "methods": 15}
    p_values = [one.estimate.p_value or 0.0 for one in comparisons]
    adjusted, highest = {}, 0.0
    for rank, p in enumerate(sorted(p_values)):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        adjusted[p] = highest
    assert [one.p_adjusted for one in comparisons] == pytest.approx([adjusted[p] for p in p_values])
    assert all(one.direction(0.95) == 0 or (one.p_adjusted or 1) <= 0.05 for one in comparisons)


def test_one_seed_has_the_interval_over_images_and_no_test() -> None:
    of = random_study(seeds=[7])
    statistics = study_statistics(of, PARAMETERS)
    estimate = statistics.estimates[KD_SMALL]["l1", "FSS(S,T)"]
    (value,) = values_of(of, KD_SMALL, ("l1", "FSS(S,T)"))
    assert estimate.value == value and estimate.interval == (value - 0.1, value + 0.2) and not estimate.over_seeds
    assert all(one.p_adjusted is None and one.direction(0.95) == 0 for one in statistics.comparisons)
    likeness = next(one for one in statistics.comparisons if one.question == "likeness")
    assert math.isfinite(likeness.estimate.interval[0])
    assert statistics.seeds == (1, 1)


def test_equal_seeds_and_unknown_values_do_not_make_a_claim() -> None:
    same = over_seeds([0.02, 0.02])
    assert same.interval == (0.02, 0.02) and same.p_value is None  # two seeds may agree by chance, above all in an accuracy
    assert over_seeds([math.nan, 0.5]).seeds == 1 and math.isnan(over_seeds([]).value)
    of = random_study()
    missing = [replace(m, value=math.nan) if m.cell.endswith("small/tiny/kd/seed1") else m for m in of.measurements]
    statistics = study_statistics(replace(of, measurements=tuple(missing)), PARAMETERS)
    assert statistics.estimates[KD_SMALL]["l1", "RS(S)"].seeds == 4
    one = comparison(statistics, "methods", "at minus kd, small → tiny", "l1", "RS(S)")
    assert one.estimate.seeds == 4


def test_seeds_are_paired_and_incomplete_cells_left_out() -> None:
    of = random_study()
    kept = tuple(m for m in of.measurements if not m.cell.endswith("large/tiny/at/seed2"))
    name = ("l2", "RS(S)")
    at, kd = values_of(replace(of, measurements=kept), AT_LARGE, name), values_of(of, KD_LARGE, name)
    del kd[2]
    one = comparison(study_statistics(replace(of, measurements=kept), PARAMETERS), "methods", "at minus kd, large → tiny", *name)
    assert one.estimate.seeds == 4 and one.estimate.p_value == pytest.approx(stats.ttest_rel(at, kd).pvalue)
    nothing = study_statistics(replace(of, measurements=()), PARAMETERS)
    assert nothing.groups == () and nothing.comparisons == () and nothing.seeds == (0, 0)


def test_of_many_methods_each_is_compared_with_the_first() -> None:
    statistics = study_statistics(random_study(methods=("kd", "at", "crd", "rkd", "dkd")), PARAMETERS)
    subjects = {one.subject for one in statistics.comparisons if one.question == "methods" and one.subject.endswith(", small → tiny")}
    assert subjects == {f"{method} minus kd, small → tiny" for method in ("at", "crd", "rkd", "dkd")}


@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_a_detectable_difference_is_detected_with_the_stated_probability(seeds: int) -> None:
    effect = detectable(seeds)
    samples = np.random.default_rng(seeds).normal(effect, 1, (20_000, seeds))
    found = float((stats.ttest_1samp(samples, 0, axis=1).pvalue <= 0.05).mean())
    assert abs(found - 0.8) < 4 * math.sqrt(0.16 / 20_000)
    with pytest.raises(ValueError, match="two seeds"):
        detectable(1)


def test_a_clear_effect_survives_the_correction() -> None:
    of = random_study()
    rng = np.random.default_rng(1)
    planted = tuple(replace(m, value=-0.2 + float(rng.normal(0, 0.005))) if m.score == BALANCE else m for m in of.measurements)
    comparisons = study_statistics(replace(of, measurements=planted), PARAMETERS).comparisons
    assert {one.direction(0.95) for one in comparisons if one.question == "balance"} == {-1}


# ---------------------------------------------------------------- studies in which no claim is true

CHAINS = (("small", (), "kd"), ("small", (), "at"), ("large", (), "kd"), ("large", (), "at"), ("large", ("middle",), "kd"))
"""Teacher, assistants and method of every student."""


def null_study(rng: np.random.Generator, seeds: int = 5, images: int = 40) -> Study:
    """Networks of which all are draws from one distribution: a student is another seed of the base, and teachers differ in nothing.

    The images have two factors that the labels depend on, so all FSS and RS are far above zero.
    """
    labels = np.arange(images) % 4
    factors = np.eye(4)[labels] + 0.7 * rng.normal(size=(images, 4))
    roles = ["small", "large", "base", *CHAINS]
    weights = rng.normal(size=(seeds, len(roles), 4, 6))
    features = factors @ weights + 1.2 * rng.normal(size=(seeds, len(roles), images, 6))
    target = torch.from_numpy(np.broadcast_to(np.eye(4)[labels], (seeds, 1, images, 4)).copy())
    matrices = torch.cat([u_centered(distances(x)) for x in (torch.from_numpy(features), target)], 1).flatten(2)
    products = matrices @ matrices.mT
    numbers = {
        cell(teacher, method, seed, above): _scores(products[seed], roles.index(teacher), 2, 3 + place)
        for seed in range(seeds)
        for place, (teacher, above, method) in enumerate(CHAINS)
    }
    for values in numbers.values():
        values["", ACCURACY] = float(rng.binomial(images, 0.8)) / images
        values["", "accuracy(base)"] = float(rng.binomial(images, 0.8)) / images
    return study(numbers)


def _scores(products: torch.Tensor, teacher: int, base: int, student: int) -> dict[tuple[str, str], float]:
    place = {"teacher": teacher, "base": base, "student": student, TARGET: len(products) - 1}
    scores = {}
    for name, definition in scores_among(("teacher", "base", "student")).items():
        index = torch.tensor([place[matrix] for matrix in definition.matrices])
        scores[name] = float(STATISTICS[definition.statistic](products[index[:, None], index]))
    contrasts = {contrast_name(*pair): scores[pair[0]] - scores[pair[1]] for pair in contrasts_among(("teacher", "base", "student"))}
    return {("l", name): value for name, value in (scores | contrasts).items()}


def test_the_scores_of_the_simulation_are_those_of_kdx() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(20) % 4
    features = {role: rng.normal(size=(20, 5)) + np.eye(5)[labels] for role in ("teacher", "base", "student")}
    (layer,) = kdx.compare({"l": features}, labels, permutations=0).values()
    stack = torch.stack([u_centered(distances(torch.from_numpy(x))) for x in (*features.values(), np.eye(4)[labels])]).flatten(1)
    ours = _scores(stack @ stack.T, 0, 1, 2)
    assert ours == {("l", name): pytest.approx(float(score)) for name, score in layer.scores.items()} | {
        ("l", name): pytest.approx(difference.value) for name, difference in layer.contrasts.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_where_nothing_is_true_no_claim_is_made_more_often_than_its_level(seeds: int) -> None:
    """Every kind of test on its own, and Holm's correction over all of them: at most the 99.9% bound of the binomial distribution."""
    rng, studies, level = np.random.default_rng(15), 200, 0.05
    single, corrected = Counter[tuple[str, str, str]](), 0
    for _ in range(studies):
        comparisons = study_statistics(null_study(rng, seeds), PARAMETERS, 1 - level).comparisons
        for one in comparisons:
            single[one.question, one.subject, one.score] += int(one.estimate.p_value is not None and one.estimate.p_value <= level)
        corrected += any(one.direction(1 - level) for one in comparisons)
    bound = stats.binom.ppf(1 - 0.001 / len(single), studies, level)
    assert len(single) == 22
    assert {name: count for name, count in single.items() if count > bound} == {}
    assert sum(single.values()) <= 1.2 * level * studies * len(single)
    assert corrected <= stats.binom.ppf(0.999, studies, level)
