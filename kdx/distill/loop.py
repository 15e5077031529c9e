"""The training of one network: epochs, optimizer, learning rate, validation, and checkpoints to resume from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdx.distill import checkpoints
from kdx.distill.data import SplitImages, augmented
from kdx.distill.losses import summed
from kdx.distill.seeding import seeded
from kdx.distill.settings import EpochCallback, EpochResult, TrainingSettings
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph

_WARM_UP = 0.1  # share of the steps over which the learning rate rises

BatchLoss = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""The parts of the loss of a batch, from images [n, 3, H, W] in [0, 1], labels [n], and positions [n] among the training images."""


@dataclass(frozen=True)
class Training:
    """One network to train: its graph and loss, its images, and how long."""

    role: str
    graph: FeatureGraph
    loss: BatchLoss
    images: SplitImages
    validation: SplitImages
    epochs: int
    recipe: checkpoints.Recipe
    """Everything that the weights depend on; stored with them."""
    settings: TrainingSettings
    device: torch.device
    objective: nn.Module = field(default_factory=nn.Module)
    """What is trained beside the network and discarded afterwards; its state is stored with the unfinished training."""


def train(training: Training, folder: Path, on_epoch: EpochCallback) -> None:
    """Write the weights with the best validation accuracy to ``folder``/ROLE.safetensors.

    Ties go to the lower cross entropy, then to the later epoch. Training resumes from a state file where one exists. Finished weights
    are kept. Raises KdxError if either file belongs to another recipe, or if a loss is not finite.
    """
    role, epochs, graph, recipe = training.role, training.epochs, training.graph, training.recipe
    path, state_path = folder / f"{role}.safetensors", folder / f"{role}.state.pt"
    if checkpoints.is_finished(path, recipe):
        state_path.unlink(missing_ok=True)
        on_epoch(EpochResult(role, epochs, epochs))
        return
    optimizer = _optimizer(training)
    state = checkpoints.resume(state_path, recipe, graph.network, optimizer)
    if "objective" in state:
        training.objective.load_state_dict(state["objective"])
    for epoch in range(state["epoch"], epochs):
        loss = _train_epoch(training, epoch, optimizer)
        accuracy, entropy = evaluate(graph, training.validation, training.device)
        if not math.isfinite(loss) or not math.isfinite(entropy):
            raise KdxError(f"The training of the {role} diverged in epoch {epoch + 1}: its loss is {loss}.", "Give a lower learning rate.")
        if [accuracy, -entropy] >= state["best_score"]:
            best = {key: value.detach().cpu().clone() for key, value in graph.network.state_dict().items()}
            state |= {"best_score": [accuracy, -entropy], "best": best}
        state |= {"epoch": epoch + 1, "model": graph.network.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"objective": training.objective.state_dict()}
        checkpoints.save_state(state_path, state)
        on_epoch(EpochResult(role, epoch + 1, epochs, loss, accuracy))
    checkpoints.save_weights(path, state["best"], recipe)
    state_path.unlink()


def _train_epoch(training: Training, epoch: int, optimizer: torch.optim.Optimizer) -> float:
    """The mean loss of one pass over the images. All its random numbers follow from (seed, epoch)."""
    settings, images, device = training.settings, training.images, training.device
    generator = np.random.default_rng([settings.seed, epoch])
    batches = np.array_split(generator.permutation(len(images)), math.ceil(len(images) / settings.batch))
    total = torch.zeros((), dtype=torch.float64, device=device)
    training.graph.train()
    training.objective.train()
    with seeded(device, settings.seed, epoch):  # for dropout
        for step, positions in enumerate(batches):
            pixels, labels, read = images.read(positions)
            pixels = augmented(pixels, settings, generator)
            loss = summed(training.loss(pixels.to(device), labels.to(device), torch.from_numpy(read).to(device)))
            done = (epoch * len(batches) + step + 1) / (training.epochs * len(batches))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(done)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.detach() * len(labels) / len(images)
    return float(total)


def evaluate(graph: FeatureGraph, images: SplitImages, device: torch.device) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross entropy of a network on a split; the network is left in evaluation mode."""
    correct = entropy = 0.0
    graph.eval()
    with torch.no_grad():
        for positions in np.array_split(np.arange(len(images)), math.ceil(len(images) / 256)):
            pixels, labels, _ = images.read(positions)
            logits = graph(pixels.to(device))[0].float().cpu()
            correct += float((logits.argmax(1) == labels).sum())
            entropy += float(functional.cross_entropy(logits, labels, reduction="sum"))
    return correct / len(images), entropy / len(images)


def _optimizer(training: Training) -> torch.optim.Optimizer:
    settings, parameters = training.settings, [*training.graph.parameters(), *training.objective.parameters()]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)


def _schedule(done: float) -> float:
    """The learning rate's factor at a share of the steps in (0, 1]: a linear rise, then half a cosine down to 0."""
    if done < _WARM_UP:
        return done / _WARM_UP
    return (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2
