"""Numbers that describe one image of a run, by which its images are sorted and chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kdx.runs import schema
from kdx.runs.evaluation import evaluated_names, evaluated_number
from kdx.runs.measured import Samples
from kdx.runs.record import LostResult, RunRecord

CHANGED, WRONG, DISAGREEMENT = "changed", "wrong", "disagreement"

MEANINGS = {
    CHANGED: "how much the student's prediction differs from the base's (without a base, from the teacher's)",
    WRONG: "the confidence with which the student predicts a wrong class",
    DISAGREEMENT: "how many pairs of networks predict different classes",
}
"""The numbers that follow from predictions. samples.parquet has what they are computed from."""


def changed(samples: Samples) -> NDArray[np.float64]:
    """How much the student's prediction differs from the base's, [n] in [0, 2]; without a base, from the teacher's.

    With class k and confidence c of each of two predictions, it is |c_1 - c_2| for the same class and c_1 + c_2 for two classes. That is
    the L1 distance of the vectors that have c at k and 0 at every other class. A run stores only the predicted class and its confidence,
    so this is not the distance of the two networks' probabilities.
    """
    first, second = _compared(samples)
    same = samples.predictions[first] == samples.predictions[second]
    a, b = (np.asarray(samples.confidences[role], dtype=np.float64) for role in (first, second))
    return np.where(same, np.abs(a - b), a + b)


def wrong(samples: Samples) -> NDArray[np.float64]:
    """The confidence with which the student predicts a wrong class, [n] in [-1, 1]; of a right prediction, minus its confidence.

    The images with the highest values are those on which the student is most certain of a wrong class, and the images with the lowest
    values are those on which it is most certain of the true class.
    """
    confidence = np.asarray(samples.confidences["student"], dtype=np.float64)
    return np.where(samples.correct("student"), -confidence, confidence)


def disagreement(samples: Samples) -> NDArray[np.float64]:
    """How many pairs of the run's networks predict different classes, [n]: an integer from 0 to the number of pairs."""
    pairs = [a != b for a, b in combinations(samples.predictions.values(), 2)]
    return np.asarray(np.sum(pairs, axis=0, dtype=np.float64))


_FROM_PREDICTIONS: dict[str, Callable[[Samples], NDArray[np.float64]]] = {CHANGED: changed, WRONG: wrong, DISAGREEMENT: disagreement}


def _compared(samples: Samples) -> tuple[str, str]:
    return "student", "base" if "base" in samples.predictions else "teacher"


def prediction_names(roles: Collection[str]) -> tuple[str, ...]:
    """The numbers of `MEANINGS` that images have with these roles. A single network can only be wrong."""
    return tuple(MEANINGS) if len(roles) > 1 else (WRONG,)


def prediction_numbers(samples: Samples) -> dict[str, NDArray[np.float64]]:
    """The numbers of `prediction_names` of these images [n]."""
    return {name: _FROM_PREDICTIONS[name](samples) for name in prediction_names(samples.predictions)}


def number_names(run: RunRecord) -> tuple[str, ...]:
    """The names of all numbers per image: those of `MEANINGS`, ``ROLE_confidence``, and ``LAYER/KIND/NAME`` of each map.

    The numbers of maps are those of `kdx.runs.record.MapColumns`, which runs of kdx 0.1.0 do not have, and those of `kdx evaluate`.
    """
    maps = [
        schema.map_column(layer, kind, name)
        for layer in run.layers
        for kind in run.map_kinds
        if kind in run.map_summaries[layer]
        for name in schema.MAP_COLUMNS
    ]
    return (*prediction_names(run.roles), *map(schema.confidence_column, run.roles), *maps, *evaluated_names(run))


def image_number(run: RunRecord, name: str) -> NDArray[np.float64]:
    """One number for every image [n], in the order of samples.parquet. Raises KeyError for a name that the run does not have."""
    from_predictions = prediction_numbers(run.samples)
    if name in from_predictions:
        return from_predictions[name]
    for role in run.roles:
        if name == schema.confidence_column(role):
            return np.asarray(run.samples.confidences[role], dtype=np.float64)
    if name in evaluated_names(run):
        return evaluated_number(run, name)
    if name not in number_names(run):
        raise KeyError(name)
    layer, kind, column = name.rsplit("/", 2)
    columns = run.map_columns(layer, kind)
    if columns is None:
        raise LostResult(f"{run.folder / schema.SAMPLES_FILE} has no column {name}.", "Run kdx explain again with the same options.")
    return np.asarray(getattr(columns, column), dtype=np.float64)
