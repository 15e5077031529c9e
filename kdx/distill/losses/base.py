"""The interface between the losses and the training loop.

A loss is a module: its parameters (adapters) are trained beside the student and discarded afterwards, its buffers (memory banks) are part
of the state that a training resumes from, and ``requirements`` lists what the loop must compute for it. Called with a `Batch`, it
returns a scalar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from kdx.kernels import geometry

Pairs = Literal["none", "last", "all"]
"""The pairs of layers whose features a loss reads."""

_PAIRS: tuple[Pairs, ...] = ("none", "last", "all")


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network for a batch.

    logits: [n, classes]. features: one feature map [n, C, H, W] per pair of layers. pre_activations: the same before the activation
    function that ends the layer, or the feature itself where there is none. head: the weight [classes, C] of the classifier, where C is
    the width of the last feature. The last two are present if a loss requires them.
    """

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    pre_activations: tuple[Tensor, ...] = ()
    head: Tensor | None = None

    def wide(self) -> Outputs:
        """The same in float32, or in float64 where they are: losses are not computed in half precision."""
        return Outputs(
            geometry.wide(self.logits),
            tuple(map(geometry.wide, self.features)),
            tuple(map(geometry.wide, self.pre_activations)),
            None if self.head is None else geometry.wide(self.head),
        )


@dataclass(frozen=True)
class Batch:
    """What a loss reads of a batch of n images.

    labels: classes [n], or probabilities [n, classes] of mixed images. indices: the positions [n] of the images among the training images;
    only memory banks need them.
    """

    student: Outputs
    teacher: Outputs
    labels: Tensor
    indices: Tensor | None = None


@dataclass(frozen=True)
class Requirements:
    """What a loss needs. Logits and labels are always available.

    logits: whether it reads the logits. pairs: the pairs of layers whose features it reads. pre_activations: whether it reads these before
    the activation. head: whether it reads the weights of the classifiers. adapters: whether it may train layers of its own. memory:
    whether it stores numbers per training image, and so needs ``Batch.indices``. classes: whether each image must have one class, so
    that mixup and cutmix are not possible.
    """

    logits: bool = False
    pairs: Pairs = "none"
    pre_activations: bool = False
    head: bool = False
    adapters: bool = False
    memory: bool = False
    classes: bool = False

    def __or__(self, other: Requirements) -> Requirements:
        """What either needs."""
        names = [entry.name for entry in fields(self) if entry.name != "pairs"]
        flags = {name: getattr(self, name) or getattr(other, name) for name in names}
        return Requirements(**flags, pairs=max(self.pairs, other.pairs, key=_PAIRS.index))


@dataclass(frozen=True)
class Shapes:
    """What is known before training: the shape [C, H, W] of each paired feature, and the training images' labels [N]."""

    student: tuple[torch.Size, ...] = ()
    teacher: tuple[torch.Size, ...] = ()
    classes: int = 0
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class LossSettings(Protocol):
    """The settings that losses read; `kdx.distill.TrainingSettings` has them."""

    @property
    def temperature(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def beta(self) -> float: ...


LOSS_SETTINGS = ("temperature", "alpha", "beta")
"""The names of the settings in `LossSettings`: a student's weights depend on them."""


class DistillationLoss(nn.Module):
    """A loss between student and teacher: ``Batch`` -> scalar.

    A subclass is constructed as ``Loss(shapes, settings, **options)``. Its options are keyword-only parameters whose defaults are numbers;
    ``--method name,option=value`` sets them.
    """

    requirements: ClassVar[Requirements] = Requirements()
    option_ranges: ClassVar[Mapping[str, tuple[float, float]]] = MappingProxyType({})
    """The smallest and the largest value of options. The options of kdx's own losses are otherwise at least 0."""

    def __init__(self, shapes: Shapes, settings: LossSettings) -> None:
        super().__init__()
        self.weight = 1.0
        """The factor of the loss where the user gives none."""
        self.label_weight = 1.0
        """The factor of the cross entropy with the labels beside this loss."""

    def forward(self, batch: Batch) -> Tensor:
        raise NotImplementedError
