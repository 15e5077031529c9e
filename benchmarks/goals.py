"""Goals: bounds that the project sets on the times of a benchmark's variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.record import quartiles


@dataclass(frozen=True)
class Goal:
    """A bound on the median of one quantity of a variant.

    quantity: "ratio" is the variant's time over the baseline's, "seconds" is its time, and "extra seconds" is its time minus the
    baseline's. Ratios and differences are taken round by round.
    """

    variant: str
    bound: Literal["least", "most"]
    value: float
    quantity: Literal["ratio", "seconds", "extra seconds"] = "ratio"

    @property
    def unit(self) -> str:
        return "" if self.quantity == "ratio" else " s"

    def label(self, baseline: str) -> str:
        """What is measured, in words."""
        return {
            "ratio": f"{self.variant} over {baseline}",
            "seconds": self.variant,
            "extra seconds": f"{self.variant} minus {baseline}",
        }[self.quantity]

    def measured(self, baseline: str, samples: Mapping[str, list[float]]) -> float | None:
        """The quantity's median, or None if the variant or the baseline did not run."""
        if self.variant not in samples or (self.quantity != "seconds" and baseline not in samples):
            return None
        seconds = np.array(samples[self.variant])
        if self.quantity == "ratio":
            seconds = seconds / np.array(samples[baseline])
        elif self.quantity == "extra seconds":
            seconds = seconds - np.array(samples[baseline])
        return quartiles(seconds)[1]

    def judged(self, baseline: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
        """The goal's entry in a stored record. The key "ratio" holds the label, which in the first records was always one of a ratio."""
        value = self.measured(baseline, samples)
        holds = None if value is None else value >= self.value if self.bound == "least" else value <= self.value
        label, unit = self.label(baseline), self.unit
        return {"ratio": label, "unit": unit, "bound": self.bound, "wanted": self.value, "found": value, "holds": holds}
