"""Metrics that run the networks again, on a run: against kdx's own functions on the same images and networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import kdx
from kdx.data.images import load_images
from kdx.errors import KdxError
from kdx.evaluate.candidates import candidates
from kdx.evaluate.evaluate import evaluate
from kdx.evaluate.metrics import EvaluationOptions
from kdx.evaluate.ranking import rank_correlation
from kdx.evaluate.recomputation import RecomputedMaps
from kdx.evaluate.recomputed_metrics import RECOMPUTED
from kdx.evaluate.subject import Sources, Subject
from kdx.report.evaluation import evaluation_section
from kdx.runs.evaluation import Evaluation, write_evaluation
from kdx.runs.record import read_run
from tests import oracle
from tests.made_runs import edit


def silent(line: str) -> None: ...


@pytest.fixture(scope="module")
def subject(explained: Path, folder: Path) -> Subject:
    return Subject(read_run(explained), None, 0, Sources(models=folder / "models.toml"), silent)


def measured(run: Path, folder: Path, metrics: list[str], maps: list[str], **options: Any) -> Evaluation:
    return evaluate(
        run, models=folder / "models.toml", metrics=metrics, maps=maps, options=EvaluationOptions(**options), images=None, announce=silent
    )


@pytest.fixture(scope="module")
def recomputed(explained: Path, folder: Path) -> Evaluation:
    return measured(explained, folder, [metric.name for metric in RECOMPUTED], ["all"])


def values(evaluation: Evaluation, metric: str, candidate: str, part: str = "") -> NDArray[np.float64]:
    (measurement,) = [m for m in evaluation.measurements if (m.metric, m.candidate, m.part) == (metric, candidate, part)]
    return evaluation.values[measurement.number]


def test_maps_of_the_same_networks_and_images_are_those_of_the_run(subject: Subject) -> None:
    pixels, labels = subject.pixels(slice(None)), torch.from_numpy(subject.labels)
    again = RecomputedMaps(subject, subject.networks, pixels, labels)
    for name, candidate in candidates(subject.run).items():
        assert oracle.error(np.array(candidate.maps(again, "layer3")), np.array(candidate.maps(subject, "layer3"))) < 1e-4, name


@pytest.mark.slow
def test_each_candidate_is_recomputed_with_random_weights(recomputed: Evaluation, subject: Subject) -> None:
    steps = [m.part for m in recomputed.measurements if (m.metric, m.candidate) == ("randomisation", "distilled")]
    assert steps[:2] == ["", "to fc"] and steps[-1] == "to conv1"
    # The head has no influence on features; all parts together give the untrained student.
    assert oracle.error(values(recomputed, "randomisation", "rs_student_minus_base", "to fc"), np.ones(29)) < 1e-9
    assert oracle.error(values(recomputed, "randomisation", "rs_base"), np.ones(29)) < 1e-9
    assert oracle.error(values(recomputed, "randomisation", "centre"), np.ones(29)) < 1e-9
    assert np.isnan(values(recomputed, "randomisation", "uniform")).all()
    assert oracle.error(values(recomputed, "randomisation_ssim", "uniform"), np.ones(29)) < 1e-9
    networks: dict[str, Any] = {**subject.networks, "student": subject.untrained("student")}
    explainer = kdx.Explainer(**networks, layers=["layer3"], runtime="eager", geometry="whole", permutations=0)
    maps = explainer(subject.pixels(slice(None)), torch.from_numpy(subject.labels)).layers["layer3"].score_maps["RS(S) - RS(B)"].maps
    expected = rank_correlation(torch.from_numpy(subject.stored_maps("layer3", "rs_student_minus_base")), maps)
    assert oracle.error(values(recomputed, "randomisation", "rs_student_minus_base"), expected) < 0.02


@pytest.mark.slow
def test_the_page_has_the_steps_of_the_cascade(recomputed: Evaluation, explained: Path) -> None:
    write_evaluation(read_run(explained), recomputed)
    section = evaluation_section(read_run(explained))
    assert section is not None
    (block,) = [block for block in section.blocks if block.title == "Rank correlation with random weights"]
    steps = block.tables[1]
    assert steps.columns[:2] == ["Map", "fc"] and steps.columns[-1] == "conv1" and "layer3" in steps.title
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in steps.rows}
    assert cells["RS(B)"][-1].startswith("1.000") and not cells["RS(S) − RS(B)"][-1].startswith("1.000")


@pytest.mark.slow
def test_both_networks_become_random(explained: Path, folder: Path) -> None:
    """A map of the base alone changes only if the base becomes random."""
    both = measured(explained, folder, ["randomisation"], ["rs_base"], randomised="both")
    assert float(np.mean(values(both, "randomisation", "rs_base"))) < 0.9


@pytest.mark.slow
def test_labels_contexts_and_noise(recomputed: Evaluation) -> None:
    for metric in ("label_randomisation", "batches", "references"):
        centre = values(recomputed, metric, "centre")
        assert oracle.error(centre[np.isfinite(centre)], np.ones(29 if metric != "references" else 29 - 2 * 9)) < 1e-9
        assert float(np.nanmean(values(recomputed, metric, "rs_student_minus_base"))) < 0.95
    assert oracle.error(values(recomputed, "label_randomisation", "fss_student"), np.ones(29)) < 1e-5
    for metric in ("batches", "references"):
        assert float(np.nanmin(values(recomputed, metric, "grad_cam_student"))) > 1 - 1e-6
    assert float(values(recomputed, "sensitivity", "centre").max()) == 0
    assert float(np.nanmin(values(recomputed, "sensitivity", "grad_cam_student"))) > 0


def test_perturbation_by_the_networks_of_the_run(explained: Path, folder: Path, subject: Subject) -> None:
    """One deletion curve with two steps, by hand: the image, half of it deleted, and its mean colour."""
    evaluation = measured(explained, folder, ["deletion"], ["centre"], steps=2, detailed=8)
    values_, gains = (values(evaluation, "deletion", "centre", part) for part in ("", "gain"))
    rows = np.flatnonzero(np.isfinite(values_))
    assert len(rows) == 8 and np.bincount(subject.labels[rows]).min() >= 2
    pixels = load_images(subject.dataset, subject._index[rows], (12, 12)).pixels
    centre = candidates(subject.run)["centre"].maps(subject, "layer3")[0].astype(np.float64)
    nearest = torch.from_numpy(centre > np.sort(centre.ravel())[71])
    far = torch.from_numpy(centre < np.sort(centre.ravel())[71])
    tied = ~(nearest | far)  # their order is random, and they may be on either side
    mean = pixels.mean((2, 3), keepdim=True)

    def probability(role: str, images: Tensor) -> Tensor:
        network = subject.networks[role]
        logits = network.module((images - 0.5) / 0.5)
        return logits.softmax(1).gather(1, torch.from_numpy(subject.labels[rows])[:, None])[:, 0].detach()  # type: ignore[no-any-return]

    for role, areas_ in (("student", values_), ("base", values_ - gains)):
        first, last = probability(role, pixels), probability(role, mean.expand_as(pixels))
        middles = [probability(role, pixels.where(~deleted, mean)) for deleted in (nearest, nearest | tied)]
        expected = [(first + 2 * middle + last) / 4 for middle in middles]
        spread = float((expected[0] - expected[1]).abs().max())
        assert float((torch.from_numpy(areas_[rows]) - expected[0]).abs().max()) < 2 * spread + 1e-4 < 0.02


@pytest.mark.slow
def test_results_do_not_depend_on_parts(explained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = ["insertion", "deletion", "road_keep", "road_remove"]
    whole = measured(explained, folder, metrics, ["uniform"], steps=3)
    monkeypatch.setattr("kdx.evaluate.perturbed_metrics.PART", 5)
    (explained / "evaluation.json").unlink()
    again = measured(explained, folder, metrics, ["uniform"], steps=3)
    for metric in metrics:
        for part in ("", "gain"):
            assert oracle.error(values(again, metric, "uniform", part), values(whole, metric, "uniform", part)) < 1e-4


def test_other_targets_are_refused(explained: Path, folder: Path) -> None:
    edit(explained / "manifest.json", target_file="embeddings.npy")
    try:
        with pytest.raises(KdxError, match="another target"):
            measured(explained, folder, ["sensitivity"], ["centre"])
    finally:
        edit(explained / "manifest.json", target_file=None)
