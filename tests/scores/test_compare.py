"""Every score of several layers in one call, against the one-pair functions."""

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
    asked = {"permutations": 49, "seed": 3, "batch": batch}
    return {
        "FSS(S,T)": kdx.fss(s, t, **asked),  # type: ignore[arg-type]
        "FSS(B,T)": kdx.fss(b, t, **asked),  # type: ignore[arg-type]
        "RS(T)": kdx.rs(t, labels, **asked),  # type: ignore[arg-type]
        "RS(S)": kdx.rs(s, labels, **asked),  # type: ignore[arg-type]
        "RS(B)": kdx.rs(b, labels, **asked),  # type: ignore[arg-type]
        "RS(S|B)": kdx.rs(s, labels, b, **asked),  # type: ignore[arg-type]
        "RS(B|S)": kdx.rs(b, labels, s, **asked),  # type: ignore[arg-type]
        "RS(T|S)": kdx.rs(t, labels, s, **asked),  # type: ignore[arg-type]
        "RS(S|T)": kdx.rs(s, labels, t, **asked),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize(("n", "batch"), [(40, None), (300, None), (150, 32)])
def test_scores_are_fss_and_rs(n: int, batch: int | None) -> None:
    features, labels = layers(n)
    found = kdx.compare(features, labels, batch=batch, permutations=49, seed=3)
    assert list(found) == ["early", "late"]
    for layer, result in found.items():
        for name, score in expected(features[layer], labels, batch).items():
            assert result.scores[name].value == pytest.approx(score.value, rel=1e-9), name
            assert (result.scores[name].n, result.scores[name].batches) == (score.n, score.batches) == (n, 5 if batch else 1)
            if batch is None or name.startswith("RS"):  # the batches of two features alone are not dealt by classes
                assert result.scores[name].interval == pytest.approx(score.interval, rel=1e-7), name
                assert result.scores[name].p_value == score.p_value, name


def test_without_a_teacher() -> None:
    features, labels = layers(40)
    alone = {layer: {role: value for role, value in given.items() if role != "teacher"} for layer, given in features.items()}
    found, whole = kdx.compare(alone, labels, permutations=19), kdx.compare(features, labels, permutations=19)
    assert list(found["late"].scores) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"]
    for name, score in found["late"].scores.items():
        assert score.value == pytest.approx(whole["late"].scores[name].value, rel=1e-12)


def test_batches_pool_to_about_the_whole_sets_scores() -> None:
    """Of intervals from eight dealings to batches of 32, four in five and more hold the whole set's scores."""
    features, labels = layers(320)
    whole = kdx.compare({"late": features["late"]}, labels, permutations=0)["late"].scores
    held = []
    for seed in range(8):
        for name, score in kdx.compare({"late": features["late"]}, labels, batch=32, permutations=0, seed=seed)["late"].scores.items():
            held.append(score.interval[0] <= whole[name].value <= score.interval[1])
    assert sum(held) >= 0.8 * len(held)


@pytest.mark.parametrize("n", [40, 300])
def test_bad_input(n: int) -> None:
    features, labels = layers(n)
    late = features["late"]
    for spoilt, said in (
        ({**late, "base": late["student"]}, "left of the student's features at late without what the base's"),
        ({**late, "base": late["base"].index_fill(0, torch.tensor([5]), torch.nan)}, "base's features at late are not finite in rows 5"),
        ({**late, "base": late["base"][:-1]}, f"{n - 1} rows of base's"),
        ({**late, "teacher": late["teacher"].float()}, "type"),
        ({**late, "teacher": torch.zeros_like(late["teacher"])}, "teacher's features at late are constant"),
    ):
        with pytest.raises(kdx.KdxError, match=said):
            kdx.compare({"late": spoilt}, labels)
    with pytest.raises(kdx.KdxError, match="one class"):
        kdx.compare(features, torch.ones_like(labels))
    with pytest.raises(kdx.KdxError, match="no features"):
        kdx.compare({}, labels)
    with pytest.raises(ValueError, match="teacher"):
        kdx.compare({"late": {"tutor": late["teacher"]}}, labels)
    with pytest.raises(kdx.KdxError, match="too small"):
        kdx.compare(features, labels, batch=3)


def test_one_pass_makes_each_networks_distances_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = layers(40)
    seen = []
    distances = geometry.distances

    def counted(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return distances(x)

    monkeypatch.setattr(geometry, "distances", counted)
    kdx.compare({"late": features["late"]}, labels, permutations=0)
    assert len(seen) == 4  # teacher, student, base and the target
