"""What a metric is, and all metrics by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError
from kdx.evaluate.candidates import Candidate, Maps, at_image_size
from kdx.evaluate.subject import Subject
from kdx.runs.evaluation import MetricRecord

Values = NDArray[np.float64]

Need = Literal["masks", "images", "networks", "untrained", "labels"]
"""What a metric needs besides the maps. untrained: the student's architecture with random weights. labels: relevance to one-hot labels."""


LEAST = 12
"""The fewest images among which maps are computed anew: two reference sets of four, and others that are compared with them."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Choices of the metrics.

    tolerance: of the pointing game, in pixels of the networks' input. detailed: the most images of metrics that run the networks again and
    again, balanced over the classes. steps: of the insertion and the deletion curve. randomised: whose weights become random, the
    student's or those of student and base (both).
    """

    tolerance: float = 0.0
    detailed: int = 64
    steps: int = 16
    randomised: Literal["student", "both"] = "student"


@dataclass(frozen=True)
class Task:
    """One candidate at one layer, to be measured by a metric. layer: the student's; the first one for a baseline, which has none."""

    subject: Subject
    candidate: Candidate
    layer: str
    options: EvaluationOptions

    @cached_property
    def maps(self) -> Maps:
        """The maps [n, h, w] at the resolution of the features, with their signs and not scaled."""
        return self.candidate.maps(self.subject, self.layer)

    def at_image_size(self, part: slice) -> Maps:
        """The maps [k, H, W] of some images as metrics see them: in [0, 1], at the images' size (`kdx.evaluate.candidates`)."""
        return at_image_size(self.maps[part], self.subject.size)

    def per_image(self, measure: Callable[[slice], NDArray[Any]]) -> Values:
        """The values [n, ...] of ``measure``, which returns those of one part of the images."""
        return np.concatenate([np.asarray(measure(part), dtype=np.float64) for part in self.subject.parts])


@dataclass(frozen=True)
class Metric:
    """A metric of maps, with one value per image.

    name: in files and on the command line. title: in tables. meaning: one or two sentences for the page. better: whether higher or lower
    values are better; None for a number that is neither. needs: what it needs besides the maps. options: the names of the
    `EvaluationOptions` that its values depend on. chance: the value of a map that states nothing, where it is the same for all images.
    hits: whether values are 1 or 0, a hit or none. measure: the values [n] of a task by part; a metric of one number has the part "".
    applies: whether it is defined for a candidate.
    """

    name: str
    title: str
    meaning: str
    better: Literal["higher", "lower"] | None
    measure: Callable[[Task], Mapping[str, Values]] = field(repr=False)
    needs: frozenset[Need] = frozenset()
    options: tuple[str, ...] = ()
    chance: float | None = None
    hits: bool = False
    applies: Callable[[Candidate], bool] = field(default=lambda candidate: True, repr=False)

    def record(self, basis: Mapping[str, Any]) -> MetricRecord:
        """The metric as its results describe it."""
        return MetricRecord(self.title, self.meaning, self.better, self.chance, basis)


def chosen_metrics(known: Mapping[str, Metric], names: Sequence[str]) -> list[Metric]:
    """The metrics of these names; all for none. Raises KdxError for a name that is not a metric."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(known)
            raise KdxError(f"There is no metric {name!r}.", f"Choose among: {', '.join(near)}.")
    return [known[name] for name in dict.fromkeys(names or known)]
