"""Small networks and quick settings for tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdx.distill import EpochResult, TrainingSettings

TEACHER = "kdx:resnet,width=4,depth=1,stages=2"
STUDENT = "kdx:resnet,width=2,depth=1,stages=2"
QUICK = TrainingSettings(epochs=3, teacher_epochs=2, batch=50, augment=True, flip=True, student_images=100, image_size=(8, 8))


class GradientTimes(torch.autograd.Function):
    """The identity ``apply(x, factor)``, whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Interruption(Exception):
    """Stands for Ctrl-C in a test."""


def stop_at(network: str, epoch: int) -> Callable[[EpochResult], None]:
    """A callback that interrupts training after this epoch of this network."""

    def on_epoch(result: EpochResult) -> None:
        if (result.network, result.epoch) == (network, epoch):
            raise Interruption

    return on_epoch


def summaries(results: list[EpochResult]) -> list[tuple[str, int, bool]]:
    """Network, epoch, and whether it was trained now and not by an earlier run."""
    return [(result.network, result.epoch, result.loss is not None) for result in results]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside the block, the system refuses to write more bytes to a file, as a full disk does."""
    import resource  # Windows does not have it

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
