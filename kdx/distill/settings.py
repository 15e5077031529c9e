"""Training settings, the result of an epoch, and the demonstration's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from kdx.choices import COVER, Resizing
from kdx.distill.losses import parse_method
from kdx.errors import KdxError


@dataclass(frozen=True)
class TrainingSettings:
    """How the networks of a distillation are trained.

    ``student_images`` trains base and student on a class-balanced part of the train split; the teacher is always trained on all of it.
    ``teacher_epochs`` is the number of epochs of the teacher, by default ``epochs``. ``temperature``, ``alpha`` and ``beta`` belong to
    the distillation losses and do not change the teacher's training. ``augment`` shifts each image by up to a twelfth of its size,
    and ``flip`` mirrors half of the images. ``image_size`` is (height, width), and ``resizing`` how images are brought to
    it. ``split_seed`` determines which images are in the splits
    train, validation and test, and ``seed`` everything else that is random: networks with the same ``split_seed`` are trained on the same
    images. ``max_unreadable`` is the share of corrupt images in a split above which the training fails; one image always passes, unless the
    share is 0.

    Raises KdxError for an unknown method and for a setting out of range.
    """

    method: str = "kd"
    epochs: int = 30
    teacher_epochs: int | None = None
    batch: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    temperature: float = 4.0
    alpha: float = 0.9
    beta: float = 1000.0
    seed: int = 0
    split_seed: int = 0
    augment: bool = False
    flip: bool = False
    student_images: int | None = None
    image_size: tuple[int, int] | None = None
    resizing: Resizing = COVER
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        parse_method(self.method)
        in_range = {
            "epochs": self.epochs >= 1,
            "teacher_epochs": self.teacher_epochs is None or self.teacher_epochs >= 1,
            "batch": self.batch >= 2,
            "optimizer": self.optimizer in ("sgd", "adamw"),
            "learning_rate": 0 < self.learning_rate < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "temperature": 0 < self.temperature < math.inf,
            "alpha": 0 <= self.alpha <= 1,
            "beta": 0 <= self.beta < math.inf,
            "seed": self.seed >= 0,
            "split_seed": self.split_seed >= 0,
            "student_images": self.student_images is None or self.student_images >= 2,
            "max_unreadable": 0 <= self.max_unreadable <= 1,
            "image_size": self.image_size is None or min(self.image_size) >= 1,
        }
        for name, is_in_range in in_range.items():
            if not is_in_range:
                hint = _RANGE_HINTS.get(name, "Give a number above 0.")
                raise KdxError(f"The training setting {name} cannot be {getattr(self, name)!r}.", hint)


_RANGE_HINTS = {
    "batch": "Give a batch of 2 or more, because batch normalisation needs it.",
    "optimizer": "Choose sgd or adamw.",
    "weight_decay": "Give 0 or more.",
    "alpha": "Give a number from 0 (labels only) to 1 (teacher only).",
    "beta": "Give 0 or more.",
    "max_unreadable": "Give a share from 0 to 1.",
    "seed": "Give 0 or more.",
    "split_seed": "Give 0 or more.",
    "student_images": "Give 2 or more; leave it out for the whole train split.",
}


@dataclass(frozen=True)
class EpochResult:
    """The mean training loss and the accuracy on the validation split after one epoch of the training of ``network`` (a role).

    Both are None for a network that an earlier run finished.
    """

    network: str
    epoch: int
    epochs: int
    loss: float | None = None
    accuracy: float | None = None


EpochCallback = Callable[[EpochResult], None]

_DEMO_SETTINGS = TrainingSettings(epochs=80, teacher_epochs=8, batch=32, augment=True, student_images=80, image_size=(24, 24))

DEMO: dict[str, Any] = {
    "data": "digits",
    "teacher": "kdx:resnet,width=16,depth=2",
    "student": "kdx:resnet,width=8,depth=1",
    "kd": _DEMO_SETTINGS,
    "at": replace(_DEMO_SETTINGS, method="at"),
}
"""The demonstration: a small student that sees eight images per class, under a teacher that has seen the whole train split."""
