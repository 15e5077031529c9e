"""One layer over a whole set in tiles, against all images in memory at once, and against the definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kdx
from kdx.choices import ObjectiveName, Weighting
from kdx.explain.layer import measure
from kdx.explain.settings import Settings
from kdx.explain.whole_set import SetMeasurement, SetRows, measure_set
from kdx.features.rows import InMemory
from kdx.features.target import Target
from kdx.kernels import geometry, reference, tiles
from kdx.roles import SCORE_MAPS, TARGET
from kdx.scores.pool import pooled_scores
from tests import oracle
from tests.explain.test_layer import roles

N = 150
SETTINGS = Settings(permutations=19)


def rows(features: Mapping[str, Tensor]) -> dict[str, SetRows]:
    return {role: SetRows(InMemory(x.permute(0, 2, 3, 1).flatten(1)), (x.shape[1], x.shape[2], x.shape[3])) for role, x in features.items()}


def measured(
    features: Mapping[str, Tensor], target: Target, settings: Settings = SETTINGS, folder: Path | None = None, shuffled: bool = False
) -> tuple[SetMeasurement, dict[str, Tensor]]:
    maps: dict[str, Tensor] = {}

    def output(name: str, shape: tuple[int, int, int]) -> Tensor:
        maps[name] = torch.full(shape, torch.nan, dtype=torch.float64)
        return maps[name]

    return measure_set(rows(features), target, settings, output, folder=folder, shuffled=shuffled), maps


@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_unicams_maps_equal_those_of_all_images_at_once(objective: ObjectiveName, weighting: Weighting) -> None:
    features, labels = roles(N)
    _, maps = measured(features, Target.of(labels), replace(SETTINGS, objective=objective, weighting=weighting))
    for name, explained, given in (("distilled", "student", "base"), ("missed", "teacher", "student"), ("new", "student", "teacher")):
        expected = kdx.unicam(features[explained], features[given], labels, objective, weighting)
        assert oracle.error(maps[name], expected.maps) < 1e-9


def test_score_maps_equal_decompose_and_add_up_to_the_scores() -> None:
    features, labels = roles(N)
    measurement, maps = measured(features, Target.of(labels))
    s, b, t = features["student"], features["base"], features["teacher"]
    for name, expected in {
        "rs_teacher": kdx.decompose(t, labels),
        "rs_student_given_base": kdx.decompose(s, labels, given=b),
        "rs_teacher_given_student": kdx.decompose(t, labels, given=s),
        "rs_student_minus_base": kdx.decompose(s, labels, minus=b),
        "fss_base": kdx.decompose(b, t),
        "fss_teacher": kdx.decompose(t, s),
        "fss_student_minus_base": kdx.decompose(s, t, minus=b),
    }.items():
        assert oracle.error(maps[name], expected.maps) < 1e-9, name
    scores = pooled_scores(measurement.products, measurement.permuted, measurement.moments, n=N)
    values = {name: score.value for name, score in (scores.scores | scores.contrasts).items()}
    for name, kind in SCORE_MAPS.items():
        assert float(measurement.statistics[name].total.sum()) == pytest.approx(values[kind.score], abs=1e-9)
        assert oracle.error(measurement.statistics[name].total, maps[name].sum((1, 2))) < 1e-9


@pytest.mark.slow
def test_float32_features_on_disk_with_close_pairs_give_the_same_maps(tmp_path: Path) -> None:
    features, labels = roles(N)
    features = {role: x.float() + 30 for role, x in features.items()}  # far from the origin
    for x in features.values():
        x[7] = x[8] + 1e-5 * torch.randn_like(x[8])
        x[9] = x[10]
    measurement, maps = measured(features, Target.of(labels), folder=tmp_path)
    exact = {role: x.double() for role, x in features.items()}
    expected, _ = measured(exact, Target.of(labels))
    assert oracle.error(measurement.products, expected.products) < 1e-6
    _, exact_maps = measured(exact, Target.of(labels))
    for name in SCORE_MAPS:
        assert oracle.error(maps[name], exact_maps[name]) < 2e-4, name
    g = geometry.u_centered(geometry.distances(torch.nn.functional.one_hot(labels).double()))
    share = reference.shares(exact["student"].flatten(2), g)
    norms = measurement.products[1, 1] * measurement.products[3, 3]
    assert oracle.error(maps["rs_student"].flatten(1), share / (N * (N - 3)) / norms.sqrt()) < 2e-4
    assert (tmp_path / "distances-0.npy").exists()


def test_the_order_of_the_images_permutes_the_maps() -> None:
    features, labels = roles(N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    _, maps = measured(features, Target.of(labels))
    _, permuted = measured({role: x[order] for role, x in features.items()}, Target.of(labels[order]))
    for name, values in maps.items():
        assert oracle.error(permuted[name], values[order]) < 1e-9


def test_stability_is_the_correlation_of_the_maps_with_either_half_as_context() -> None:
    features, labels = roles(N)
    measurement, _ = measured(features, Target.of(labels), shuffled=True)
    x = features["student"].flatten(2)
    squared = (x[:, None] - x[None]).square().sum(2)  # [n, n, P]
    d = squared.sum(2).sqrt()
    g = geometry.u_centered(geometry.distances(torch.nn.functional.one_hot(labels).double()))
    parts = torch.where(d > 0, g / d, 0.0)[:, :, None] * squared
    half = 2 * tiles.tile_side(N, [])  # the boundary of tiles nearest to N/2
    first, second = parts[:, :half].sum(1).numpy(), parts[:, half:].sum(1).numpy()
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]
    assert tiles.tile_side(N, []) == 32
    assert oracle.error(measurement.statistics["rs_student"].stability, np.array(expected)) < 1e-9


@pytest.mark.slow
def test_maps_of_unrelated_features_are_not_stronger_than_their_null() -> None:
    features, labels = roles(N)
    generator = torch.Generator().manual_seed(5)
    noise = {role: torch.randn(x.shape, dtype=torch.float64, generator=generator) for role, x in features.items()}
    related, _ = measured(features, Target.of(labels))
    unrelated, _ = measured(noise, Target.of(labels))

    def above(measurement: SetMeasurement, name: str) -> float:
        return float((measurement.statistics[name].strength > measurement.null[name].high).double().mean())

    assert set(related.null) == set(related.statistics)
    for name in ("rs_student", "rs_base", "fss_student", "fss_teacher"):
        assert above(unrelated, name) < 0.3
    assert above(related, "rs_student") > 0.9 and above(related, "fss_student") > 0.9


def test_the_null_is_the_strength_under_a_permuted_target() -> None:
    features, labels = roles(N)
    measurement, _ = measured(features, Target.of(labels), replace(SETTINGS, permutations=1, seed=4), shuffled=True)
    parts = torch.arange(N).split(32)
    generator = torch.Generator().manual_seed(4)
    turned = torch.cat([part.roll(-int(torch.randint(len(part), (1,), generator=generator))) for part in parts])
    for name, maps in {
        "rs_student": kdx.decompose(features["student"], labels[turned]).maps,
        "rs_student_minus_base": kdx.decompose(features["student"], labels[turned], minus=features["base"]).maps,
        "fss_student": kdx.decompose(features["student"], features["teacher"][turned]).maps,
        "distilled": kdx.unicam(features["student"], features["base"], labels[turned]).maps,
    }.items():
        strength = maps[:128].abs().mean((1, 2))
        assert measurement.null[name].median == pytest.approx(float(strength.quantile(0.5)), rel=1e-9)
        assert measurement.null[name].high == pytest.approx(float(strength.quantile(0.95)), rel=1e-9)


def test_without_a_teacher_the_other_results_are_the_same() -> None:
    features, labels = roles(N)
    _, expected = measured(features, Target.of(labels))
    del features["teacher"]
    measurement, maps = measured(features, Target.of(labels))
    assert set(maps) == {name for name, kind in SCORE_MAPS.items() if "teacher" not in {r for s in kind.shares for r in s}} | {
        "distilled",
        "residual",
    }
    for name, values in maps.items():
        assert oracle.error(values, expected[name]) < 1e-9
    assert list(measurement.permuted) == [TARGET]


def test_features_of_tokens_and_embeddings_as_target() -> None:
    features, _ = roles(N)
    tokens = {role: x.flatten(2)[..., None] for role, x in features.items()}
    embedding = torch.from_numpy(np.random.default_rng(0).normal(size=(N, 6)))
    _, maps = measured(tokens, Target.of(embedding))
    expected = kdx.decompose(tokens["student"], embedding)
    assert maps["rs_student"].shape == (N, features["student"][0, 0].numel(), 1)
    assert oracle.error(maps["rs_student"], expected.maps) < 1e-9


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f | {"base": torch.full_like(f["base"], 2.0)}, "base's features are constant"),
        (lambda f: f | {"base": 2 * f["student"]}, "Nothing is left"),
        (lambda f: f | {"student": torch.full_like(f["student"], torch.nan)}, "student's features are not finite"),
    ],
)
def test_features_without_geometry_are_refused(spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    features, labels = roles(N)
    with pytest.raises(kdx.KdxError, match=message):
        measured(spoil(features), Target.of(labels))


def test_a_whole_set_equals_a_batch_of_all_images() -> None:
    features, labels = roles(N)
    batch = measure(features, Target.of(labels), permutations=torch.empty(0, N, dtype=torch.int64))
    measurement, maps = measured(features, Target.of(labels))
    assert oracle.error(measurement.products, batch.products) < 1e-12
    for name, value in batch.maps.items():
        assert oracle.error(maps[name], value.maps) < 1e-9


@pytest.mark.parametrize("n", [4, 5, 17, pytest.param(33, marks=pytest.mark.slow), pytest.param(65, marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_sets_of_any_size_equal_all_images_at_once(n: int, objective: ObjectiveName) -> None:
    features, labels = roles(n)
    labels[:4] = torch.tensor([0, 0, 1, 1])
    measurement, maps = measured(features, Target.of(labels), replace(SETTINGS, objective=objective))
    for name, explained, given in (("distilled", "student", "base"), ("missed", "teacher", "student")):
        expected = kdx.unicam(features[explained], features[given], labels, objective)
        assert torch.equal(maps[name] != 0, expected.maps != 0)  # four images leave no gradient of relevance
        assert torch.allclose(maps[name], expected.maps, rtol=1e-9, atol=1e-12)
    expected_shares = kdx.decompose(features["student"], labels, given=features["base"]).maps
    assert oracle.error(maps["rs_student_given_base"], expected_shares) < 1e-9
    if n > 5:
        assert not measurement.statistics["rs_student"].stability.isnan().any()


def test_no_map_is_made_of_rounding_where_the_features_explain_the_target_completely() -> None:
    features, _ = roles(40)
    _, maps = measured(features, Target.of(features["student"].flatten(1)))
    assert not maps["distilled"].any()  # G - <G^,B^> B^ - L R^ is zero
    assert maps["rs_student"].any()
