"""Training settings, the result of an epoch, and the demonstration's settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from kdx.choices import COVER, OptimizerName, Resizing, ScheduleName, Selection, TrainingPrecision
from kdx.distill.losses import method_requirements, parse_method
from kdx.errors import KdxError


@dataclass(frozen=True)
class TrainingSettings:
    """How the networks of a distillation are trained.

    ``student_images`` trains base and student on a class-balanced part of the train split; the teacher is always trained on all of it.
    ``teacher_epochs`` is the number of epochs of the teacher, by default ``epochs``. ``temperature``, ``alpha`` and ``beta`` belong to
    the distillation losses and do not change the teacher's training. ``image_size`` is (height, width), and ``resizing`` how images are
    brought to it. ``split_seed`` determines which images are in the splits train, validation and test, and ``seed`` everything else that
    is random: networks with the same ``split_seed`` are trained on the same images. ``max_unreadable`` is the share of corrupt images in
    a split above which the training fails; one image always passes, unless the share is 0.

    ``batch`` is the number of images per step of the optimizer, over all processes. ``accumulate`` computes its gradient in this many
    parts, which saves memory; batch normalisation then uses the statistics of a part. ``schedule`` is the learning rate after the
    linear rise over the share ``warm_up`` of the steps: half a cosine down to 0; ``step``, multiplied by ``gamma`` after the epochs
    ``milestones`` (by default after 1/2 and 3/4 of the epochs); or ``constant``. ``momentum`` and ``nesterov`` belong to ``sgd``.
    ``clip`` is the largest L2 norm of the gradient of all weights. ``ema`` is the decay per step of the exponential moving average of the
    weights, which is then what is validated and kept. ``select`` names the epoch whose weights are kept: the highest validation
    accuracy, the lowest validation loss (cross entropy), or the last. ``patience`` stops a training after this many epochs without a
    better one.

    ``augment`` shifts each image by up to a twelfth of its size, and ``flip`` mirrors half of the images. `kdx.distill.augmentation`
    describes ``random_crop``, ``colour_jitter``, ``rand_augment``, ``mixup`` and ``cutmix``.

    ``precision`` is the number format in which networks are trained (autocast); weights and losses are float32. ``channels_last``
    changes the memory layout, and ``compile`` compiles the networks with torch.compile. All of these change results by rounding.
    ``save_minutes`` is the time between two states from which a training resumes; one is also saved after every epoch.

    Raises KdxError for an unknown method, for a setting out of range, and for settings that exclude one another.
    """

    method: str = "kd"
    epochs: int = 30
    teacher_epochs: int | None = None
    batch: int = 64
    optimizer: OptimizerName = "sgd"
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
    momentum: float = 0.9
    nesterov: bool = True
    schedule: ScheduleName = "cosine"
    warm_up: float = 0.1
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    label_smoothing: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    ema: float | None = None
    select: Selection = "accuracy"
    patience: int | None = None
    random_crop: float | None = None
    colour_jitter: float = 0.0
    rand_augment: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    precision: TrainingPrecision = "float32"
    channels_last: bool = False
    compile: bool = False
    save_minutes: float = 5.0

    def __post_init__(self) -> None:
        parse_method(self.method)
        in_range = {
            "epochs": self.epochs >= 1,
            "teacher_epochs": self.teacher_epochs is None or self.teacher_epochs >= 1,
            "batch": self.batch >= 2,
            "optimizer": self.optimizer in get_args(OptimizerName),
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
            "momentum": 0 <= self.momentum < 1,
            "nesterov": not self.nesterov or self.momentum > 0 or self.optimizer != "sgd",
            "schedule": self.schedule in get_args(ScheduleName),
            "warm_up": 0 <= self.warm_up < 1,
            "milestones": list(self.milestones) == sorted(set(self.milestones)) and min(self.milestones, default=1) >= 1,
            "gamma": 0 < self.gamma <= 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "clip": self.clip is None or 0 < self.clip < math.inf,
            "accumulate": 1 <= self.accumulate <= self.batch // 2,
            "ema": self.ema is None or 0 < self.ema < 1,
            "select": self.select in get_args(Selection),
            "patience": self.patience is None or (self.patience >= 1 and self.select != "last"),
            "random_crop": self.random_crop is None or 0 < self.random_crop <= 1,
            "colour_jitter": 0 <= self.colour_jitter <= 1,
            "rand_augment": self.rand_augment is None or 0 <= self.rand_augment <= 30,
            "mixup": 0 <= self.mixup < math.inf,
            "cutmix": 0 <= self.cutmix < math.inf,
            "save_minutes": 0 <= self.save_minutes < math.inf,
            "precision": self.precision in get_args(TrainingPrecision),
        }
        for name, is_in_range in in_range.items():
            if not is_in_range:
                hint = _RANGE_HINTS.get(name, "Give a number above 0.")
                raise KdxError(f"The training setting {name} cannot be {getattr(self, name)!r}.", hint)
        if self.schedule != "step" and (self.milestones or self.gamma != type(self).gamma):
            raise KdxError(
                f"The schedule {self.schedule} has no milestones, and gamma has no effect.",
                "Give --schedule step, or leave out --milestone and --gamma.",
            )
        if self.mixes_images and method_requirements(self.method).classes:
            raise KdxError(
                f"The method {self.method} needs one class per image, which mixed images do not have.", "Leave out mixup and cutmix."
            )

    def later_entries(self) -> dict[str, Any]:
        """The settings in `ADDED_LATER` that differ from their defaults, for records that older versions of kdx wrote without them."""
        return {name: getattr(self, name) for name in ADDED_LATER if getattr(self, name) != getattr(type(self), name)}

    @property
    def images_vary(self) -> bool:
        """Whether the pixels of a training image differ from epoch to epoch."""
        return bool(self.augment or self.flip or self.uses_transforms or self.mixes_images)

    @property
    def uses_transforms(self) -> bool:
        """Whether a random transform of torchvision is applied to each image."""
        return self.random_crop is not None or self.colour_jitter > 0 or self.rand_augment is not None

    @property
    def mixes_images(self) -> bool:
        """Whether images are mixed, so that labels are distributions over the classes."""
        return self.mixup > 0 or self.cutmix > 0


ADDED_LATER = (
    "momentum", "nesterov", "schedule", "warm_up", "milestones", "gamma", "label_smoothing", "clip", "accumulate", "ema", "select",
    "patience", "random_crop", "colour_jitter", "rand_augment", "mixup", "cutmix", "precision", "channels_last", "compile",
)  # fmt: skip
"""The settings that kdx 0.1.0 did not have. Their defaults are what it did."""

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
    "momentum": "Give a number from 0 to below 1.",
    "nesterov": "Give a momentum above 0, or switch Nesterov's momentum off.",
    "schedule": "Choose cosine, step or constant.",
    "warm_up": "Give a share of the steps, from 0 to below 1.",
    "milestones": "Give epochs in ascending order, each once.",
    "gamma": "Give a factor above 0 and at most 1.",
    "label_smoothing": "Give a share from 0 to below 1.",
    "accumulate": "Give a number of parts from 1 to half of the batch, because batch normalisation needs two images in each.",
    "ema": "Give a decay between 0 and 1, such as 0.999.",
    "select": "Choose accuracy, loss or last.",
    "patience": "Give 1 or more epochs, and select by accuracy or loss.",
    "random_crop": "Give the smallest share of the image's area, above 0 and at most 1.",
    "colour_jitter": "Give a strength from 0 to 1.",
    "rand_augment": "Give a magnitude from 0 to 30, such as 9.",
    "mixup": "Give 0 (off) or the parameter of the Beta distribution, such as 0.2.",
    "save_minutes": "Give 0 (after every step) or more minutes.",
    "cutmix": "Give 0 (off) or the parameter of the Beta distribution, such as 1.",
    "precision": "Choose float32, bfloat16 or float16.",
}


@dataclass(frozen=True)
class EpochResult:
    """The mean training loss and the accuracy on the validation split after one epoch of the training of ``network`` (a role).

    Both are None for a network that an earlier run finished. ``epochs`` is the number of all epochs, also where the training stops early.
    entropy: the mean cross entropy on the validation split. parts: the mean of each part of the loss. images_per_second: the speed of
    the training steps, without validation. scores: of the probe images by LAYER/SCORE, if there are any.
    """

    network: str
    epoch: int
    epochs: int
    loss: float | None = None
    accuracy: float | None = None
    entropy: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    images_per_second: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """The figures by name, for logs."""
        figures = {"loss": self.loss, "accuracy": self.accuracy, "entropy": self.entropy, "images_per_second": self.images_per_second}
        parts = {f"loss/{name}": value for name, value in self.parts.items()}
        return {"epoch": self.epoch, **{name: value for name, value in figures.items() if value is not None}, **parts, **self.scores}


EpochCallback = Callable[[EpochResult], None]


def epoch_quality(select: str, epoch: int, accuracy: float, entropy: float) -> list[float]:
    """What a training that keeps the epoch ``select`` compares: the greatest is kept, and of equal ones the latest.

    accuracy, entropy: of the epoch, on the validation split. Any other ``select`` than ``accuracy`` and ``loss`` keeps the last epoch.
    """
    return {"accuracy": [accuracy, -entropy], "loss": [-entropy, accuracy]}.get(select, [epoch, 0.0])


@dataclass(frozen=True)
class StepResult:
    """The training of ``network`` within an epoch (counted from 1 among ``epochs``), after ``step`` of the epoch's ``steps``.

    loss, parts: the means over the epoch so far; with several processes, over the images of the first one. images_per_second: of all
    processes.
    """

    network: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    parts: Mapping[str, float]
    images_per_second: float


StepCallback = Callable[[StepResult], None]

_DEMO_SETTINGS = TrainingSettings(epochs=80, teacher_epochs=8, batch=32, augment=True, student_images=80, image_size=(24, 24))

DEMO: dict[str, Any] = {
    "data": "digits",
    "teacher": "kdx:resnet,width=16,depth=2",
    "student": "kdx:resnet,width=8,depth=1",
    "kd": _DEMO_SETTINGS,
    "at": replace(_DEMO_SETTINGS, method="at"),
}
"""The demonstration: a small student that sees eight images per class, under a teacher that has seen the whole train split."""

_COMPOSITES_SETTINGS = replace(
    _DEMO_SETTINGS, epochs=24, teacher_epochs=12, learning_rate=0.05, flip=True, student_images=240, image_size=(64, 64)
)

DEMOS: dict[str, dict[str, Any]] = {
    "digits": DEMO,
    "composites": {
        "data": "composites:count=3200,clutter=0,scale=0.8",
        "teacher": "kdx:resnet,width=32,depth=1,stem=imagenet",
        "student": "kdx:resnet,width=12,depth=1,stem=imagenet",
        "kd": _COMPOSITES_SETTINGS,
        "at": replace(_COMPOSITES_SETTINGS, method="at"),
    },
}
"""The demonstrations of ``kdx demo --data``. The student of composites sees 40 images per class."""
