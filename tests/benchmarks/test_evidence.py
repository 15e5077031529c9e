"""The evidence: its scores equal those of `kdx.compare`, places of maps follow their definitions, and verdicts follow the t test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import kdx
from benchmarks import evidence_tables
from benchmarks.evidence_measures import Objects, Scoring, unicam_maps
from benchmarks.evidence_networks import DESIGNS, LAYERS, STUDENTS

N = 40


def features(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(N, 5, 4, 4, generator=generator)
    return {role: shared + torch.randn(shared.shape, generator=generator) for role in ("student", "base", "teacher")}


LABELS = np.arange(N) % 4


@pytest.mark.parametrize("batch", [None, 10])
def test_scores_are_those_of_compare(batch: int | None) -> None:
    """Over batches of equal size the two draw the same batches only if there is one, so the batches of ten are compared by hand."""
    values = features()
    scores = Scoring(batch).scores(values, LABELS, seed=0)
    if batch is None:
        expected = kdx.compare({"layer": values}, LABELS, permutations=0)["layer"].scores
        assert {name: scores[name] for name in scores} == pytest.approx({name: expected[name].value for name in scores}, abs=1e-6)
        return
    batches = kdx.data.random_batches(LABELS, batch, 0)
    ratios = [
        kdx.fss(values["student"][torch.from_numpy(b)], values["teacher"][torch.from_numpy(b)], permutations=0).value for b in batches
    ]
    assert Scoring(batch, mean=True).scores(values, LABELS)["FSS(S,T)"] == pytest.approx(np.mean(ratios), abs=1e-6)


def test_biased_scores_are_those_of_fss() -> None:
    values = features()
    expected = kdx.fss(values["student"], values["teacher"], "biased", permutations=0).value
    assert Scoring(biased=True).scores(values, LABELS)["FSS(S,T)"] == pytest.approx(expected, abs=1e-6)


def test_maps_of_batches_are_unicams() -> None:
    values = features()
    maps = unicam_maps(values, "student", "base", LABELS, 10)
    chosen = torch.from_numpy(kdx.data.random_batches(LABELS, 10, 0)[1])
    expected = kdx.unicam(values["student"][chosen], values["base"][chosen], torch.from_numpy(LABELS)[chosen]).maps
    torch.testing.assert_close(maps[chosen], expected)


def test_places_of_maps() -> None:
    """An object in the left half of an image of 4 x 4 cells of 2 x 2 pixels."""
    masks = np.zeros((3, 8, 8), bool)
    masks[:, :, :4] = True
    objects = Objects.of(masks, 4, 4)
    assert objects.constant() == pytest.approx({"density": 1, "distance": (1.5 + 3.5) / 4 / 8, "background": 0.5, "empty": 0})
    maps = torch.zeros(3, 4, 4)
    maps[0, 1, 0] = 2.0  # inside
    maps[1, 2, 3] = 5.0  # outside, at 3 and 4 pixels from the object
    maps[1, 0, 0] = -1.0  # negative values do not count
    place = objects.place(maps)
    assert place == pytest.approx({"density": (2 + 0) / 2, "distance": (0 + 3.5 / 8) / 2, "background": 0.5, "empty": 1 / 3})


def record(shift: float) -> dict[str, object]:
    """A record in which every claim's difference is normal around ``shift`` with a small spread."""
    rng = np.random.default_rng(1)
    runs = []
    for data in DESIGNS:
        for seed in range(5):
            students = {}
            for student in STUDENTS:
                boost = (student.teacher == "small") * 1.0 + student.assisted
                students[student.name] = {layer: _layer(shift, boost, rng) for layer in LAYERS}
            runs.append({"data": data, "seed": seed, "students": students})
    return {"runs": runs}


def _layer(shift: float, boost: float, rng: np.random.Generator) -> dict[str, object]:
    noise = 0.01 * rng.standard_normal(4)
    scores = {"RS(S|B)": shift + noise[0], "RS(B|S)": 0.0, "FSS(S,T)": shift * (1 + boost) + noise[1], "FSS(B,T)": 0.0}
    places = {"distilled": {"distance": 0.0, "background": 0.0}, "residual": {"distance": shift + noise[2], "background": shift + noise[3]}}
    kinds = {variant.scores: scores for variant in evidence_tables.VARIANTS}
    return {"scores": kinds, "maps": {variant.maps: places for variant in evidence_tables.VARIANTS}}


@pytest.mark.parametrize(("shift", "word"), [(0.3, "holds"), (-0.3, "**contradicted**"), (0.0, "not settled")])
def test_verdicts(shift: float, word: str) -> None:
    judged = evidence_tables.verdicts(record(shift))
    assert len(judged) == 24
    assert [verdict.word for verdict in judged.values()].count(word) >= 23
    values = np.array([evidence_tables.CLAIMS[2].value(run, "layer3", evidence_tables.VARIANTS[0]) for run in record(shift)["runs"][:5]])  # type: ignore[index]
    interval = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert judged[2, "composites", 0].interval == pytest.approx(interval)
    assert judged[2, "composites", 0].p_adjusted >= stats.ttest_1samp(values, 0).pvalue
