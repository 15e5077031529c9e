"""Named sets of options for `kdx explain --preset`."""

from __future__ import annotations

from typing import Any

from kdx.choices import PresetName

PRESETS: dict[PresetName, dict[str, Any]] = {
    "published": {
        "geometry": "batch",
        "batch": 5,
        "ratios": "mean",
        "features": "salient",
        "keep": 0.5,
        "noise": 0.01,
        "salient_class": "true",
        "salient_score": "probability",
        "salient_image": "published",
        "resize": "squash",
        "interpolation": "bilinear",
    }
}
"""The options of `kdx.runs.plan.RunOptions` that each preset sets. ``published``: those of the scores in the authors' code of December 2024
(docs/published.md). Its target is a file that `kdx explain --target` names."""
