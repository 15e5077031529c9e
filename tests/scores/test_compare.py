"""kdx.compare against kdx.fss and kdx.rs, for several layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kdx
from kdx.kernels import geometry
from kdx.scores.score import Score
from tests.explain.test_layer import roles


def layers(n: int) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    features, labels = roles(n)
    return {"early": {role: value[:, :3] for role, value in features.items()}, "late": features}, labels


def expected(f: dict[str, Tensor], labels: Tensor, batch: int | None) -> dict[str, Score]:
    t, s, b = f["teacher"], f["student"], f["base"]
    options = {"permutations": 49, "seed": 3, "batch": batch}
    return {
        "FSS(S,T)": kdx.fss(s, t, **options),  # type: ignore[arg-type]
        "FSS(B,T)": kdx.fss(b, t, **options),  # type: ignore[arg-type]
        "RS(T)": kdx.rs(t, labels, **options),  # type: ignore[arg-type]
        "RS(S)": kdx.rs(s, labels, **options),  # type: ignore[arg-type]
        "RS(B)": kdx.rs(b, labels, **options),  # type: ignore[arg-type]
        "RS(S|B)": kdx.rs(s, labels, b, **options),  # type: ignore[arg-type]
        "RS(B|S)": kdx.rs(b, labels, s, **options),  # type: ignore[arg-type]
        "RS(T|S)": kdx.rs(t, labels, s, **options),  # type: ignore[arg-type]
        "RS(S|T)": kdx.rs(s, labels, t, **options),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize(("n", "batch"), [(40, None), pytest.param(300, None, marks=pytest.mark.slow), (150, 32)])
def test_scores_equal_fss_and_rs(n: int, batch: int | None) -> None:
    features, labels = layers(n)
    comparison = kdx.compare(features, labels, batch=batch, permutations=49, seed=3)
    assert list(comparison) == ["early", "late"]
    for layer, result in comparison.items():
        for name, score in expected(features[layer], labels, batch).items():
            assert result.scores[name].value == pytest.approx(score.value, rel=1e-9), name
            assert (result.scores[name].n, result.scores[name].batches) == (score.n, score.batches) == (n, 5 if batch else 1)
            if batch is None or name.startswith("RS"):  # FSS without a target draws other random numbers
                assert result.scores[name].interval == pytest.approx(score.interval, rel=1e-7), name
                assert result.scores[name].p_value == score.p_value, name


def test_without_a_teacher() -> None:
    features, labels = layers(40)
    alone = {layer: {role: value for role, value in by_role.items() if role != "teacher"} for layer, by_role in features.items()}
    comparison, whole = kdx.compare(alone, labels, permutations=19), kdx.compare(features, labels, permutations=19)
    assert list(comparison["late"].scores) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"]
    for name, score in comparison["late"].scores.items():
        assert score.value == pytest.approx(whole["late"].scores[name].value, rel=1e-12)


def test_scores_over_batches_estimate_those_of_the_whole_set() -> None:
    """At least four in five intervals, from eight random splits into batches of 32, contain the scores of the whole set."""
    features, labels = layers(320)
    whole = kdx.compare({"late": features["late"]}, labels, permutations=0)["late"].scores
    covered = []
    for seed in range(8):
        for name, score in kdx.compare({"late": features["late"]}, labels, batch=32, permutations=0, seed=seed)["late"].scores.items():
            covered.append(score.interval[0] <= whole[name].value <= score.interval[1])
    assert sum(covered) >= 0.8 * len(covered)


@pytest.mark.parametrize("n", [40, 300])
def test_bad_input(n: int) -> None:
    features, labels = layers(n)
    late = features["late"]
    for spoilt, message in (
        ({**late, "base": late["student"]}, "left of the student's features at late: the base's"),
        ({**late, "base": late["base"].index_fill(0, torch.tensor([5]), torch.nan)}, "base's features at late are not finite in rows 5"),
        ({**late, "base": late["base"][:-1]}, f"{n - 1} rows of base's"),
        ({**late, "teacher": late["teacher"].float()}, "type"),
        ({**late, "teacher": torch.zeros_like(late["teacher"])}, "teacher's features at late are constant"),
    ):
        with pytest.raises(kdx.KdxError, match=message):
            kdx.compare({"late": spoilt}, labels)
    with pytest.raises(kdx.KdxError, match="one class"):
        kdx.compare(features, torch.ones_like(labels))
    with pytest.raises(kdx.KdxError, match="no features"):
        kdx.compare({}, labels)
    with pytest.raises(ValueError, match="teacher"):
        kdx.compare({"late": {"tutor": late["teacher"]}}, labels)
    with pytest.raises(kdx.KdxError, match="too small"):
        kdx.compare(features, labels, batch=3)


def test_each_networks_distances_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = layers(40)
    seen = []
    distances = geometry.distances

    def counted(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return distances(x)

    monkeypatch.setattr(geometry, "distances", counted)
    kdx.compare({"late": features["late"]}, labels, permutations=0)
    assert len(seen) == 4  # teacher, student, base and the target
