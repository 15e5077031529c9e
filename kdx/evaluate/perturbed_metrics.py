"""Insertion, deletion and ROAD of the maps of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kdx.evaluate import perturbation, scoring
from kdx.evaluate.metrics import Metric, Need, Task, Values
from kdx.evaluate.perturbation import Curves
from kdx.evaluate.recomputation import detailed_rows, key
from kdx.evaluate.scoring import Logits, Scoring
from kdx.evaluate.subject import PART, Subject
from kdx.export.graphs import FeatureGraph
from kdx.runtimes.eager import EagerRunner

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The shares of the pixels that ROAD removes."""

GAIN = "gain"
"""The part of a metric whose score is p_S - p_B."""


def _measured(curves: Callable[[Task], Callable[..., Curves]], task: Task) -> dict[str, Values]:
    """The area of each image, by p_S and, if there is a base, by p_S - p_B."""
    subject = task.subject
    rows = detailed_rows(subject, task.options)
    names = ("", GAIN) if "base" in subject.run.roles else ("",)
    values = {name: np.full(len(subject), np.nan) for name in names}
    maps = torch.from_numpy(np.array(task.maps))
    with ExitStack() as stack:
        logits = {role: _logits(subject, role, stack) for role in subject.run.roles if role != "teacher"}
        for start in range(0, len(rows), PART):
            part = rows[start : start + PART]
            numbers = [int(place) for place in subject.places[part]]
            score = _scoring(logits, torch.from_numpy(subject.labels[part]))
            areas = curves(task)(score, subject.pixels(part), maps[part], seed=subject.seed, numbers=numbers).area.reshape(len(part), -1)
            for name, area in zip(names, areas.T, strict=True):
                values[name][part] = area.numpy()
    return values


def _kept(task: Task) -> dict[str, Values]:
    return _once("keep", _keeping, task)


def _removed(task: Task) -> dict[str, Values]:
    return _once("remove", _removal, task)


def _difference(task: Task) -> dict[str, Values]:
    kept, removed = _kept(task), _removed(task)
    return {name: (kept[name] - removed[name]) / 2 for name in kept}


def _once(name: str, curves: Callable[[Task], Callable[..., Curves]], task: Task) -> dict[str, Values]:
    """The areas of ROAD in one order, which two metrics use, computed once for each map."""
    known = f"ROAD {name} {key(task.candidate, task.layer)}"
    if known not in task.subject.shared:
        task.subject.shared[known] = _measured(curves, task)
    return cast("dict[str, Values]", task.subject.shared[known])


def _scoring(logits: Mapping[str, Logits], classes: Tensor) -> Scoring:
    if "base" not in logits:
        return scoring.student_probability(logits["student"], classes)
    return scoring.probability_and_gain(logits["student"], logits["base"], classes)


def _logits(subject: Subject, role: str, stack: ExitStack) -> Logits:
    """The network of a role as a function of pixels."""
    network = subject.networks[role]
    runner = stack.enter_context(EagerRunner(FeatureGraph(network.module, [], network.preprocessing), subject.device))
    return lambda pixels: runner.infer(pixels).logits


def _deletion(task: Task) -> Callable[..., Curves]:
    return partial(perturbation.deletion, steps=task.options.steps)


def _insertion(task: Task) -> Callable[..., Curves]:
    return partial(perturbation.insertion, steps=task.options.steps)


def _removal(_task: Task) -> Callable[..., Curves]:
    return partial(perturbation.road, order="most", shares=SHARES)


def _keeping(_task: Task) -> Callable[..., Curves]:
    return partial(perturbation.road, order="least", shares=SHARES)


_NEEDS: frozenset[Need] = frozenset({"images", "networks"})

_SCORES = (
    "The score is the student's probability of the image's label; with [gain], it is that probability minus the base's. Neither suits a "
    "map of what the base has, such as residual or Grad-CAM(B). The pixels of the uniform map have a random order."
)

PERTURBED: tuple[Metric, ...] = (
    Metric(
        "insertion",
        "area under the insertion curve",
        f"The mean score while the pixels that the map ranks highest are inserted first into the blurred image. {_SCORES}",
        "higher",
        partial(_measured, _insertion),
        _NEEDS,
        options=("detailed", "steps"),
    ),
    Metric(
        "deletion",
        "area under the deletion curve",
        f"The mean score while the pixels that the map ranks highest are replaced first by the image's mean colour. {_SCORES}",
        "lower",
        partial(_measured, _deletion),
        _NEEDS,
        options=("detailed", "steps"),
    ),
    Metric(
        "road_keep",
        "ROAD, most relevant kept",
        f"The mean score when 10% to 90% of the pixels, those that the map ranks lowest, are imputed from the others. {_SCORES}",
        "higher",
        _kept,
        _NEEDS,
        options=("detailed",),
    ),
    Metric(
        "road_remove",
        "ROAD, most relevant removed",
        f"The mean score when 10% to 90% of the pixels, those that the map ranks highest, are imputed from the others. {_SCORES}",
        "lower",
        _removed,
        _NEEDS,
        options=("detailed",),
    ),
    Metric(
        "road",
        "ROAD, kept minus removed",
        f"Half of the difference between road_keep and road_remove, as in pytorch-grad-cam. {_SCORES} For the uniform map, the value is "
        "about 0, although scattered pixels are easier to impute than a region.",
        "higher",
        _difference,
        _NEEDS,
        options=("detailed",),
    ),
)
