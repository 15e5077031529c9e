"""What a run measured: the values of scores, summaries and columns of maps, the networks and the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.runs import schema


@dataclass(frozen=True)
class Entry:
    """One number of scores.json: an accuracy, a score or a contrast, with its interval and the basis of both.

    p_adjusted: the p-value adjusted for the number of layers; in older runs, which do not have it, the p-value itself.
    """

    value: float
    interval: tuple[float, float]
    p_value: float | None = None
    p_adjusted: float | None = None
    n: int | None = None
    batches: int | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Entry:
        """The entry as stored; null becomes NaN. Raises KeyError, TypeError or ValueError where ``stored`` is not an entry."""
        low, high = (math.nan if x is None else float(x) for x in stored["interval"])
        value = math.nan if stored["value"] is None else float(stored["value"])
        p_value, p_adjusted = (None if stored.get(key) is None else float(stored[key]) for key in ("p_value", "p_adjusted"))
        counts = map(optional_integer, map(stored.get, ("n", "batches")))
        return cls(value, (low, high), p_value, p_value if p_adjusted is None else p_adjusted, *counts)

    @property
    def known(self) -> bool:
        """Whether value and interval are all finite."""
        return all(map(math.isfinite, (self.value, *self.interval)))

    @property
    def sign(self) -> int:
        """1 where the whole interval lies above zero, -1 where it lies below, 0 where it includes zero or is not known."""
        low, high = self.interval
        return int(low > 0) - int(high < 0) if self.known else 0

    def settled(self, confidence: float) -> bool:
        """Whether the interval excludes zero and the permutation test, if the entry has one, rejects chance at this confidence.

        The test is that of the adjusted p-value, so that it holds over all layers of the run.
        """
        p = self.p_value if self.p_adjusted is None else self.p_adjusted
        return self.sign != 0 and (p is None or p <= 1 - confidence + 1e-12)

    def direction(self, confidence: float) -> int:
        """1 where the images settle that the number is above zero, -1 where they settle that it is below, 0 where they settle neither.

        Below zero the interval alone decides: the permutation test is one-sided, so it cannot reject chance for a negative score.
        """
        return self.sign if self.sign < 0 or self.settled(confidence) else 0


@dataclass(frozen=True)
class GroupEntries:
    """The scores and contrasts of one class or group at a layer, by name, of its n images. missing: why others have no value."""

    n: int
    scores: dict[str, Entry]
    contrasts: dict[str, Entry]
    missing: dict[str, str]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> GroupEntries:
        """The entries as stored. Raises KeyError, TypeError or ValueError where ``stored`` is not a group."""
        scores, contrasts = ({name: Entry.of(entry) for name, entry in stored[kind].items()} for kind in ("scores", "contrasts"))
        return cls(int(stored["n"]), scores, contrasts, {name: str(reason) for name, reason in stored["missing"].items()})

    @property
    def entries(self) -> dict[str, Entry]:
        return self.scores | self.contrasts


@dataclass(frozen=True)
class MapSummary:
    """A kind of map at a layer, over all images.

    empty: the share of maps that are zero everywhere. strength: the mean over the images of the mean absolute value. stability: the median
    correlation between the two maps of an image that have either half of the set as context; None if it is not known. null_strength: the
    95% quantile of the strength under a permuted target, on the scale on which 1 is the mean strength of the layer's maps; above_null: the
    share of maps that are stronger. Both are None where no permuted maps were computed.
    """

    empty: float
    strength: float
    stability: float | None
    null_strength: float | None
    above_null: float | None


@dataclass(frozen=True)
class MapColumns:
    """One kind of map at a layer, per image, in the order of samples.parquet.

    total [n]: the sum over the positions; for a map that adds up to a score, the image's contribution to the score, and the contributions
    of all images add up to it. strength [n]: the mean absolute value, where 1 is the mean over the layer's images. stability [n]: see
    `MapSummary`; NaN where it is not known.
    """

    total: NDArray[np.floating]
    strength: NDArray[np.floating]
    stability: NDArray[np.floating]


@dataclass(frozen=True)
class NetworkResult:
    """One network of a run. ``parameters`` is None where the number is not known; ``correct`` counts among ``n`` images."""

    reference: str
    parameters: int | None
    random_weights: bool
    accuracy: Entry
    correct: int
    n: int


@dataclass(frozen=True)
class Samples:
    """The images of a run, in the order of samples.parquet. Predictions and confidences [n] per role."""

    rows: NDArray[np.int64]
    ids: list[str]
    labels: NDArray[np.int64]
    predictions: dict[str, NDArray[np.int64]]
    confidences: dict[str, NDArray[np.floating]]

    @classmethod
    def of(cls, columns: Mapping[str, NDArray[Any]], ids: list[str], roles: Sequence[str]) -> Samples:
        """The images of these columns of samples.parquet."""
        predictions = {role: columns[schema.prediction_column(role)] for role in roles}
        return cls(
            columns[schema.ROW], ids, columns[schema.LABEL], predictions, {role: columns[schema.confidence_column(role)] for role in roles}
        )

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each image by its name."""
        return {name: place for place, name in enumerate(self.ids)}

    def correct(self, role: str) -> NDArray[np.bool_]:
        return np.asarray(self.predictions[role] == self.labels)


def optional_integer(value: Any) -> int | None:
    return None if value is None else int(value)
