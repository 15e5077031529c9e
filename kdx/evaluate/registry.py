"""All metrics by name, in the order in which they are computed and shown."""

from __future__ import annotations

from kdx.evaluate.localisation import LOCALISATION
from kdx.evaluate.metrics import Metric

METRICS: dict[str, Metric] = {metric.name: metric for metric in (*LOCALISATION,)}
