"""All metrics by name, in the order in which they are computed and shown."""

from __future__ import annotations

from kdx.evaluate.localisation import LOCALISATION
from kdx.evaluate.metrics import Metric
from kdx.evaluate.perturbed_metrics import PERTURBED
from kdx.evaluate.recomputed_metrics import RECOMPUTED

METRICS: dict[str, Metric] = {metric.name: metric for metric in (*LOCALISATION, *PERTURBED, *RECOMPUTED)}
