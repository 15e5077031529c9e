"""Optimizer and learning rate of a training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from kdx.distill.settings import TrainingSettings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW with the usual betas, over these parameters.

    On a processor, one pass over each parameter does all the arithmetic of its update (``fused``).
    """
    parameters = list(parameters)
    rate, decay = settings.learning_rate, settings.weight_decay
    on_processor = all(parameter.device.type == "cpu" for parameter in parameters)
    # If float16 overflows in the first step, PyTorch's fused SGD leaves its momentum uninitialised.
    fused = True if on_processor and settings.precision != "float16" else None
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, rate, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=decay, fused=fused)


def learning_rate(settings: TrainingSettings, step: int, steps: int, epoch: int, epochs: int) -> float:
    """The learning rate of step number ``step`` = 1 to ``steps`` of a training, which belongs to ``epoch`` = 0 to ``epochs`` - 1.

    It rises linearly over the share ``warm_up`` of the steps. Afterwards it is, as a share of ``settings.learning_rate``,
    (1 + cos(pi t)) / 2 with t the share of the remaining steps (cosine); gamma^k with k the number of milestones <= epoch (step); or 1.
    """
    done, warm_up = step / steps, settings.warm_up
    if done < warm_up:
        return settings.learning_rate * (done / warm_up)
    if settings.schedule == "cosine":
        return settings.learning_rate * ((1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2)
    if settings.schedule == "step":
        milestones = settings.milestones or {max(1, epochs // 2), max(1, epochs * 3 // 4)}
        return settings.learning_rate * settings.gamma ** sum(epoch >= milestone for milestone in milestones)
    return settings.learning_rate
