"""Named sets of training settings for `kdx distill --preset`."""

from __future__ import annotations

from typing import Any

from kdx.choices import TrainingPresetName

PRESETS: dict[TrainingPresetName, dict[str, Any]] = {
    "asirra": {
        "image_size": (224, 224),
        "optimizer": "sgd",
        "learning_rate": 1e-3,
        "momentum": 0.9,
        "epochs": 25,
        "batch": 32,
    },
    "cifar10": {"epochs": 20, "batch": 16},
    "plants": {"learning_rate": 1e-2, "batch": 16},
}
"""The fields of `kdx.distill.TrainingSettings` that each preset sets: those that are known of the experiments of Adhane et al.
(arXiv:2412.13943) on a data set. All other settings keep their defaults, which are not those of the paper (docs/data.md)."""
