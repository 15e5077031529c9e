"""The metrics of maps that are computed anew: randomisation, agreement and sensitivity."""

from __future__ import annotations

from kdx.evaluate.agreement import Agreement
from kdx.evaluate.metrics import Metric, Need, Task, Values
from kdx.evaluate.recomputation import Recomputation, key, recomputation
from kdx.runs.evaluation import STEP


def _randomised(task: Task) -> dict[str, Values]:
    again, result = _of(task)
    known = again.randomisation[result]
    steps = zip(known.steps, known.rank_correlation, strict=True)
    return {"": again.values(known.rank_correlation[-1]), **{STEP + step: again.values(row) for step, row in steps}}


def _randomised_ssim(task: Task) -> dict[str, Values]:
    again, result = _of(task)
    return {"": again.values(again.randomisation[result].ssim[-1])}


def _labels(task: Task) -> dict[str, Values]:
    again, result = _of(task)
    return {"": again.values(again.labels_randomised[result].rank_correlation.mean(0))}


def _batches(task: Task) -> dict[str, Values]:
    again, result = _of(task)
    return _agreement(again, again.batches[result])


def _references(task: Task) -> dict[str, Values]:
    again, result = _of(task)
    return _agreement(again, again.references[result])


def _agreement(again: Recomputation, agreement: Agreement) -> dict[str, Values]:
    return {"": again.values(agreement.rank_correlation, agreement.images)}


def _sensitivity(task: Task) -> dict[str, Values]:
    again, result = _of(task)
    return {"": again.values(again.sensitivity[result])}


def _of(task: Task) -> tuple[Recomputation, str]:
    return recomputation(task), key(task.candidate, task.layer)


_NEEDS: frozenset[Need] = frozenset({"images", "networks", "labels"})

RECOMPUTED: tuple[Metric, ...] = (
    Metric(
        "randomisation",
        "rank correlation with random weights",
        "Spearman's correlation between the map and that of a student with random weights. Near 1, the map does not depend on what the "
        "student learned. At each step, the student's weights are random from the output to one part of the network.",
        "lower",
        _randomised,
        _NEEDS | {"untrained"},
        options=("detailed", "randomised"),
    ),
    Metric(
        "randomisation_ssim",
        "SSIM with random weights",
        "The structural similarity of the same two maps, at the size of the image. Smooth maps are also similar by chance.",
        "lower",
        _randomised_ssim,
        _NEEDS | {"untrained"},
        options=("detailed", "randomised"),
    ),
    Metric(
        "label_randomisation",
        "rank correlation with permuted labels",
        "Spearman's correlation between the map and that for permuted labels, as the mean over 5 permutations. The networks stay the same. "
        "Maps that do not use the labels, such as those of FSS, have 1.",
        None,
        _labels,
        _NEEDS,
        options=("detailed",),
    ),
    Metric(
        "batches",
        "agreement between batches",
        "Spearman's correlation between two maps of an image, each compared with one of two random halves of the images. Maps of one class "
        "do not depend on other images and have 1. A map that ignores its image also has 1.",
        None,
        _batches,
        _NEEDS,
        options=("detailed",),
    ),
    Metric(
        "references",
        "agreement between reference sets",
        "Spearman's correlation between two maps of an image, each computed with one of two class-balanced reference sets "
        "that share no image.",
        None,
        _references,
        _NEEDS,
        options=("detailed",),
    ),
    Metric(
        "sensitivity",
        "maximal sensitivity",
        "The largest relative change of the map among 10 draws of uniform noise on the pixels, of at most 0.02. A map that ignores its "
        "image has 0.",
        None,
        _sensitivity,
        _NEEDS,
        options=("detailed",),
    ),
)
