"""Training a teacher, a base and a student: losses, the loop, and the demonstration's settings."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from kdx.choices import Resizing
from kdx.distill.losses import METHODS, Batch, DistillationLoss, Method, Objective, Outputs, Requirements, Shapes, attention_transfer, kd
from kdx.distill.settings import DEMO, EpochResult, TrainingSettings
from kdx.distill.train import distill, train_alone

__all__ = [
    "DEMO",
    "METHODS",
    "Batch",
    "DistillationLoss",
    "EpochResult",
    "Method",
    "Objective",
    "Outputs",
    "Requirements",
    "Resizing",
    "Shapes",
    "TrainingSettings",
    "attention_transfer",
    "distill",
    "kd",
    "train_alone",
]

_OLD_NAMES = {"Progress": EpochResult, "Settings": TrainingSettings}

if not TYPE_CHECKING:  # type checkers would accept any name otherwise

    def __getattr__(name: str) -> object:
        """The classes under their old names."""
        if name not in _OLD_NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        renamed = _OLD_NAMES[name]
        warnings.warn(f"kdx.distill.{name} is now kdx.distill.{renamed.__name__}", DeprecationWarning, stacklevel=2)
        return renamed
