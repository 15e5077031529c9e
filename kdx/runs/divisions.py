"""Which classes and groups of a run get scores of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdx.runs.plan import Plan
from kdx.scores.groups import GroupScores

CLASSES, GROUPS = "classes", "groups"


@dataclass(frozen=True, eq=False)
class Divisions:
    """The classes and groups of the images of a run, in some order of the images.

    codes [n]: the class of each image, as its place among the classes that occur; None where classes get no scores. groups: the places of
    the images of each group. names: of the classes and groups. left_out: why classes or groups get no scores.
    """

    codes: NDArray[np.int64] | None
    groups: list[Tensor]
    names: dict[str, list[str]]
    left_out: dict[str, str]

    @classmethod
    def of(cls, plan: Plan, index: NDArray[np.int64]) -> Self:
        """Those of the images ``index``, which are rows of the data set."""
        names: dict[str, list[str]] = {}
        left_out: dict[str, str] = {}
        labels, codes = np.unique(plan.dataset.labels[index], return_inverse=True)
        most = plan.options.max_classes
        if len(labels) <= most:
            names[CLASSES] = [plan.dataset.classes[label] for label in labels]
        elif most:
            left_out[CLASSES] = f"The data has {len(labels):,} classes, and scores per class were computed for at most {most:,}."
        else:
            left_out[CLASSES] = "Scores per class were not requested."
        groups: list[Tensor] = []
        if plan.grouping is not None:
            names[GROUPS], groups = list(plan.grouping.names), plan.grouping.members(index)
        return cls(codes.astype(np.int64) if CLASSES in names else None, groups, names, left_out)

    def by_kind(self, classes: Sequence[GroupScores], groups: Sequence[GroupScores]) -> dict[str, list[GroupScores]]:
        """The scores of a layer for its record."""
        return {kind: list(scores) for kind, scores in ((CLASSES, classes), (GROUPS, groups)) if kind in self.names}

    def named(self, layers: Mapping[str, Mapping[str, Sequence[GroupScores]]]) -> dict[str, dict[str, dict[str, GroupScores]]]:
        """The scores of every layer by kind, layer and name. A layer that an older version computed has none."""
        return {
            kind: {layer: dict(zip(names, grouped[kind], strict=True)) for layer, grouped in layers.items() if kind in grouped}
            for kind, names in self.names.items()
        }


def left_out_of_batches(plan: Plan, geometry: str) -> dict[str, str]:
    """Why a run with another geometry than ``whole`` has no scores of classes and groups."""
    reason = f"With the geometry {geometry}, scores compare the images of a batch, which has too few of one class or group. Use whole."
    return {CLASSES: reason} | ({} if plan.grouping is None else {GROUPS: reason})
