"""Scores per class and per group: they equal the direct scores of binary targets and of subsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import kdx
from kdx.features import arrays
from kdx.kernels import geometry, reference, tiles
from kdx.kernels.moments import SINGLE_IMAGES
from kdx.kernels.one_against_rest import ClassMatrices
from kdx.scores.groups import adjusted_groups
from kdx.scores.score import Contrast, Score
from kdx.scores.uncertainty import holm

_LAYER = "layer4"


def _networks(n: int, classes: int = 4, seed: int = 0) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Features of a teacher, a student and a base of different widths, and labels, of which 7 occurs once and 8 six times."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    labels[0], labels[1:7] = 7, 8
    centres = rng.normal(size=(9, 5))
    teacher = centres[labels] + rng.normal(size=(n, 5))
    student = np.hstack([0.6 * centres[labels] + 0.4 * teacher + rng.normal(size=(n, 5)), rng.normal(size=(n, 1))])
    base = 0.5 * centres[labels] + rng.normal(size=(n, 5))
    return {"teacher": teacher, "student": student, "base": base}, labels


def _same(score: Score | Contrast, direct: Score | Contrast) -> None:
    assert score.value == pytest.approx(direct.value, abs=1e-10)
    assert score.interval == pytest.approx(direct.interval, abs=1e-9)


@pytest.mark.parametrize("n", [40, 300])  # all pairs with single images left out, and tiles with 32 parts
def test_a_class_has_the_scores_of_its_binary_target_and_of_its_images(n: int) -> None:
    features, labels = _networks(n)
    scores = kdx.class_scores({_LAYER: features}, labels)[_LAYER]
    assert list(scores) == sorted(set(labels.tolist()))
    for label in (2, 8):
        member, own = labels == label, scores[label]
        direct = kdx.compare({_LAYER: features}, member.astype(int), permutations=0)[_LAYER]
        for name in (name for name in direct.scores if name.startswith("RS")):
            _same(own.scores[name], direct.scores[name])
            assert own.scores[name].n == n
        for name in ("RS(S|B) - RS(B|S)", "RS(S) - RS(B)", "RS(S) - RS(T)"):
            _same(Contrast(*own.contrasts[name][:2]), direct.contrasts[name])
    inside = {role: values[labels == 2] for role, values in features.items()}
    _same(scores[2].scores["FSS(S,T)"], kdx.fss(inside["student"], inside["teacher"], permutations=0))
    assert scores[2].scores["FSS(S,T)"].n == scores[2].n == (labels == 2).sum()


def test_a_class_has_the_scores_of_the_definition() -> None:
    """RS(S|B) of each class from the reference in float64, which centres the matrix of every binary target."""
    features, labels = _networks(40)
    scores = kdx.class_scores({_LAYER: features}, labels)[_LAYER]
    for label in (0, 1, 2, 3, 8):
        student, base = (torch.from_numpy(features[role]) for role in ("student", "base"))
        target = torch.from_numpy((labels == label).astype(np.float64))[:, None]
        a, b, g = (reference.u_centered(reference.distances(rows)) for rows in (student, base, target))
        value = reference.semipartial(a, g, b)
        assert scores[label].scores["RS(S|B)"].value == pytest.approx(float(value), abs=1e-12)


@pytest.mark.parametrize("n", [50, 700])
def test_a_group_has_the_scores_of_its_images_alone(n: int) -> None:
    features, labels = _networks(n)
    groups = np.array(["day", "night"])[np.arange(n) % 2]
    scores = kdx.group_scores({_LAYER: features}, labels, groups)[_LAYER]
    for name in ("day", "night"):
        index = groups == name
        direct = kdx.compare({_LAYER: {role: values[index] for role, values in features.items()}}, labels[index], permutations=0)[_LAYER]
        assert scores[name].n == index.sum() and not scores[name].missing
        assert scores[name].scores.keys() == direct.scores.keys() and scores[name].contrasts.keys() == direct.contrasts.keys()
        for score in direct.scores:
            _same(scores[name].scores[score], direct.scores[score])
        for contrast in direct.contrasts:
            _same(Contrast(*scores[name].contrasts[contrast][:2]), direct.contrasts[contrast])


def test_a_score_without_a_value_has_a_reason() -> None:
    features, labels = _networks(40)
    scores = kdx.class_scores({_LAYER: features}, labels)[_LAYER]
    reasons = scores[7].missing
    assert not scores[7].scores and not scores[7].contrasts and not scores[8].missing
    assert {reasons[name] for name in ("RS(S)", "RS(S|B) - RS(B|S)", "FSS(S,T)")} == {"1 image, and 5 are necessary."}
    assert reasons.keys() == scores[8].scores.keys() | scores[8].contrasts.keys()
    most = kdx.class_scores({_LAYER: features}, (np.arange(40) < 3).astype(int))[_LAYER]
    assert "3 images" in most[0].missing["RS(S)"] and "FSS(S,T)" in most[0].scores
    groups = np.zeros(40, dtype=int)
    groups[labels == 2] = 1  # a group of one class
    groups[:2] = 2
    scores = kdx.group_scores({_LAYER: features}, labels, groups)[_LAYER]
    assert "FSS(S,T)" in scores[1].scores and "RS(S)" not in scores[1].scores and scores[1].missing["RS(S)"]
    assert not scores[2].scores and scores[2].n == 2
    same = {**features, "base": features["student"].copy()}
    same["base"][labels != 3] += np.random.default_rng(1).normal(size=same["base"][labels != 3].shape)
    scores = kdx.group_scores({_LAYER: same}, np.arange(40) % 2, (labels == 3).astype(int))[_LAYER]
    assert "completely" in scores[1].missing["RS(S|B)"] and "RS(S)" in scores[1].scores and "RS(S|B)" in scores[0].scores


def test_the_order_of_the_images_and_the_names_of_classes_change_nothing() -> None:
    features, labels = _networks(60)
    order = np.random.default_rng(2).permutation(60)
    names = np.array([f"class {label}" for label in labels])
    first = kdx.class_scores({_LAYER: features}, labels)[_LAYER]
    second = kdx.class_scores({_LAYER: {role: torch.from_numpy(values[order]) for role, values in features.items()}}, names[order])[_LAYER]
    for label, scores in first.items():
        for name, score in scores.scores.items():
            _same(second[f"class {label}"].scores[name], score)


def test_p_values_are_adjusted_over_classes_and_layers() -> None:
    features, labels = _networks(80)
    other, _ = _networks(80, seed=5)
    layers = kdx.class_scores({"a": features, "b": other}, labels)
    name = "RS(S|B) - RS(B|S)"
    contrasts = [scores.contrasts[name] for groups in layers.values() for scores in groups.values() if name in scores.contrasts]
    p_values = [contrast.p_value for contrast in contrasts if contrast.p_value is not None]
    assert len(p_values) == len(contrasts) == 10
    assert [contrast.p_adjusted for contrast in contrasts] == holm(p_values)
    for contrast in contrasts:  # the p-value and the interval agree about zero
        assert contrast.p_value is not None and (contrast.p_value < 0.05) == (contrast.interval[0] > 0 or contrast.interval[1] < 0)
    assert adjusted_groups(layers) == layers


def test_sums_over_tiles_give_the_products_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one image per part and any tile size, the sums equal those of matrices in memory."""
    rng = np.random.default_rng(3)
    rows, codes = torch.from_numpy(rng.normal(size=(31, 3))), torch.from_numpy(rng.integers(4, size=31))
    monkeypatch.setattr(tiles, "TILE", 8)
    from kdx.features.rows import InMemory, feature_distances

    swept = tiles.Sweep([feature_distances(InMemory(rows), "features")], classes=codes, seed=1).run()
    order = torch.cat(swept.order)
    matrices = geometry.u_centered(geometry.distances(rows[order]))[None]
    assert swept.classes is not None
    (step,) = swept.classes.steps()
    (expected,) = ClassMatrices(matrices, codes[order]).steps()
    torch.testing.assert_close(step.products, expected.products)
    assert step.influences is not None and expected.influences is not None
    torch.testing.assert_close(step.influences.first, expected.influences.first)
    torch.testing.assert_close(step.influences.second, expected.influences.second)


@pytest.mark.parametrize("bad", [[], [[0, 1]], [0.5, 1.5], [0, 1, 2]])
def test_labels_and_groups_are_checked(bad: Any) -> None:
    features, labels = _networks(20)
    with pytest.raises(kdx.KdxError):
        kdx.class_scores({_LAYER: features}, bad)
    with pytest.raises(kdx.KdxError):
        kdx.group_scores({_LAYER: features}, labels, bad)
    with pytest.raises(kdx.KdxError):
        kdx.class_scores({}, labels)


@pytest.mark.parametrize("n", [40, 300])
def test_networks_with_the_same_geometry_are_refused_as_by_compare(n: int) -> None:
    """RS(S|B) of rounding errors would be a number without meaning."""
    features, labels = _networks(n)
    same = {_LAYER: {**features, "base": 2 * features["student"] + 1}}
    for refuses in (kdx.compare, kdx.class_scores):
        with pytest.raises(kdx.KdxError, match=r"Nothing is left of the student's features at layer4"):
            refuses(same, labels)


def test_no_matrix_of_all_images_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the size of a batch, not even for the target, which would need 20 GB for 50,000 images."""
    features, labels = _networks(700)
    row_distances = arrays.row_distances

    def small(rows: Any, *rest: Any) -> Any:
        assert max(map(len, rows.values())) <= SINGLE_IMAGES
        return row_distances(rows, *rest)

    monkeypatch.setattr(arrays, "row_distances", small)
    assert kdx.class_scores({_LAYER: features}, labels)[_LAYER][0].scores
    assert kdx.group_scores({_LAYER: features}, labels, np.arange(700) % 2)[_LAYER][0].scores
