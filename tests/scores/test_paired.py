"""Differences between the scores of two students that were computed separately, on the same images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from kdx.features.rows import InMemory
from kdx.features.target import Target
from kdx.kernels import tiles
from kdx.kernels.tiles import FeatureDistances
from kdx.roles import contrast_name, contrasts_among
from kdx.scores.paired import contrast_influences, paired_difference, score_influences
from kdx.scores.pool import pooled_scores

CLASSES = 5


def swept(features: Mapping[str, Tensor], labels: Tensor) -> tiles.Swept:
    """The sums over the images of features [n, d], which are in random order, and of the labels."""
    matrices = [FeatureDistances.of(InMemory(rows)) for rows in features.values()]
    return tiles.Sweep([*matrices, Target.of(labels, len(labels)).matrix()], shuffled=True).run()


def networks(seed: int, n: int, noise: Mapping[str, float]) -> tuple[dict[str, Tensor], Tensor]:
    """Features [n, 12] of a teacher, and of others that see the same hidden variables with more noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    generator.shuffle(labels)
    hidden = np.eye(CLASSES)[labels] @ np.random.default_rng(1).normal(size=(CLASSES, 12)) + generator.normal(size=(n, 12))
    features = {name: hidden + scale * generator.normal(size=(n, 12)) for name, scale in noise.items()}
    return {name: torch.from_numpy(values) for name, values in features.items()}, torch.from_numpy(labels)


@pytest.mark.parametrize("n", [12, 40, 150])
def test_the_difference_of_two_runs_is_the_contrast_of_a_joint_run(n: int) -> None:
    """In the joint run, the network of the second run is the base, and contrasts are computed from all matrices at once."""
    features, labels = networks(0, n, {"teacher": 0.3, "student": 0.5, "base": 1.0})
    roles = ("teacher", "student", "base")
    sums = swept({role: features[role] for role in roles}, labels)
    joint = pooled_scores(sums.products, _nothing(sums), sums.moments, n=n, roles=roles)
    runs = []
    for role in ("student", "base"):
        own = {"teacher": features["teacher"], "student": features[role]}
        known = swept(own, labels)
        scores = pooled_scores(known.products, _nothing(known), known.moments, n=n, roles=tuple(own)).scores
        runs.append((scores, score_influences(known.products, known.influences, tuple(own))))
    (scores, influences), (other_scores, other_influences) = runs
    for name, contrast in (("RS(S)", "RS(S) - RS(B)"), ("FSS(S,T)", "FSS(S,T) - FSS(B,T)")):
        values = scores[name].value, other_scores[name].value
        result = paired_difference(values, (influences[name], other_influences[name]), n=n, confidence=0.95)
        assert result.value == pytest.approx(joint.contrasts[contrast].value, abs=1e-10)
        assert result.interval == pytest.approx(joint.contrasts[contrast].interval, rel=1e-6, abs=1e-9)
    contrasts = {contrast_name(*pair): pair for pair in contrasts_among(roles)}
    by_score = score_influences(sums.products, sums.influences, roles)
    combined = contrast_influences(by_score, contrasts)["RS(S) - RS(B)"]
    assert torch.allclose(combined.first, by_score["RS(S)"].first - by_score["RS(B)"].first)


def test_a_student_does_not_differ_from_itself() -> None:
    features, labels = networks(0, 40, {"teacher": 0.3, "student": 0.5})
    sums = swept(features, labels)
    known = score_influences(sums.products, sums.influences, tuple(features))["RS(S)"]
    assert paired_difference((0.4, 0.4), (known, known), n=40, confidence=0.95) == (0.0, (0.0, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("noise", [{"a": 1.0, "b": 1.0}, {"a": 0.6, "b": 1.2}])
def test_intervals_contain_the_difference_at_their_level(noise: dict[str, float]) -> None:
    """Over 150 samples of 64 images. The true difference is that of 2,000 images, or 0 for two students of the same distribution."""
    truth = dict.fromkeys(SCORES, 0.0) if noise["a"] == noise["b"] else {k: v for k, (v, _) in differences(10_000, 2_000, noise).items()}
    samples = [differences(seed, 64, noise) for seed in range(150)]
    for name in SCORES:
        covered = np.mean([known[name][1][0] <= truth[name] <= known[name][1][1] for known in samples])
        assert 0.9 <= covered <= 0.99, (name, covered)  # 95%, up to 2.8 standard errors
        width = np.mean([known[name][1][1] - known[name][1][0] for known in samples])
        assert 0.8 <= width / (2 * 2.04 * np.std([known[name][0] for known in samples])) <= 1.3  # as wide as the estimates spread


SCORES = ("RS(S)", "FSS(S,T)")


def differences(seed: int, n: int, noise: Mapping[str, float]) -> dict[str, tuple[float, tuple[float, float]]]:
    """Student a minus student b by score, each from a computation of its own."""
    features, labels = networks(seed, n, {"teacher": 0.3, **noise})
    scores, influences = [], []
    for student in noise:
        own = {"teacher": features["teacher"], "student": features[student]}
        sums = swept(own, labels)
        scores.append(pooled_scores(sums.products, _nothing(sums), sums.moments, n=n, roles=tuple(own)).scores)
        influences.append(score_influences(sums.products, sums.influences, tuple(own)))
    return {
        name: paired_difference(
            (scores[0][name].value, scores[1][name].value), (influences[0][name], influences[1][name]), n=n, confidence=0.95
        )
        for name in SCORES
    }


def _nothing(sums: tiles.Swept) -> dict[str, Tensor]:
    """No permutations."""
    empty = sums.products.new_zeros(0, len(sums.products))
    return {"teacher": empty, "student": empty, "base": empty, "target": empty}
