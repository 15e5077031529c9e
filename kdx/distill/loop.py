"""The training of one network: epochs, steps, validation, and states to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdx.data.dataset import Indices
from kdx.distill import checkpoints
from kdx.distill.augmentation import Augmentation
from kdx.distill.data import SplitImages
from kdx.distill.losses import summed
from kdx.distill.number_formats import autocast, gradient_scaler
from kdx.distill.optimization import learning_rate, make_optimizer
from kdx.distill.processes import SINGLE, Processes
from kdx.distill.seeding import deterministic, random_state, seeded, set_random_state
from kdx.distill.settings import EpochCallback, EpochResult, StepCallback, StepResult, TrainingSettings, epoch_quality
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph

BatchLoss = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""The parts of the loss of a batch, from images [n, 3, H, W] in [0, 1], labels [n] or [n, classes], and positions [n] among the training
images. The loss is their sum in the order of the dict."""

_STEPS_BETWEEN_CHECKS = 20
"""Steps between two looks at the clock of the first process, and on a GPU at whether the losses are finite. Each waits for the others."""

_SECONDS_BETWEEN_READINGS = 0.5
"""Seconds between two readings of the losses within an epoch. A reading waits for a GPU."""

_SMALLEST_SCALE = 2.0**-24
"""float16: gradients that are not finite at a smaller scale of the loss are so at any, and every step would be left out."""


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
    augmentation: Augmentation
    objective: nn.Module = field(default_factory=nn.Module)
    """What is trained beside the network and discarded afterwards; its state is stored with the unfinished training."""
    processes: Processes = SINGLE
    probe: Callable[[nn.Module], dict[str, float]] | None = None
    """Scores of the network after an epoch."""
    log: Callable[[str, Sequence[Mapping[str, float]]], None] | None = None
    """Called after every epoch with the role and the figures of all epochs so far."""
    on_step: StepCallback | None = None
    """Called within epochs, about twice a second."""


def train(training: Training, folder: Path, on_epoch: EpochCallback) -> None:
    """Write the weights of the epoch that ``settings.select`` names to ``folder``/ROLE.safetensors.

    By accuracy, ties go to the lower cross entropy; then to the later epoch. Training resumes from a state file where one exists. It
    contains all that the following steps depend on, and is written after every epoch and every few minutes. Finished weights are kept.
    Raises KdxError if either file belongs to another recipe, or if a loss is not finite.
    """
    role, epochs, recipe = training.role, training.epochs, training.recipe
    path, state_path = folder / f"{role}.safetensors", folder / f"{role}.state.pt"
    if checkpoints.is_finished(path, recipe):
        if training.processes.is_main:
            state_path.unlink(missing_ok=True)
        on_epoch(EpochResult(role, epochs, epochs))
        return
    with deterministic(training.device):
        run = _Run(training, state_path)
        while not run.is_over:
            on_epoch(run.epoch())
    if training.processes.is_main:
        checkpoints.save_weights(path, run.state["best"], recipe)
        state_path.unlink()
    training.processes.wait()


class _Step(nn.Module):
    """All trained parameters, and the loss as a forward pass, as distributed training needs them."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.graph, self.objective, self.loss = training.graph, training.objective, training.loss

    def forward(self, images: Tensor, labels: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return self.loss(images, labels, positions)


class _Run:
    """A training at a step: its network, what changes beside it, and its state file."""

    def __init__(self, training: Training, path: Path) -> None:
        self.training, self.path = training, path
        settings, graph = training.settings, training.graph
        step = _Step(training)
        self.parameters = [*graph.parameters(), *training.objective.parameters()]
        self.optimizer = make_optimizer(self.parameters, settings)
        self.scaler = gradient_scaler(settings, training.device)
        average = None if settings.ema is None else get_ema_multi_avg_fn(settings.ema)
        self.ema = None if average is None else AveragedModel(graph.network, multi_avg_fn=average, use_buffers=True)
        others: dict[str, checkpoints.Resumable] = {"objective": training.objective, "scaler": self.scaler}
        if self.ema is not None:
            others["ema"] = self.ema
        self._others = {name: part for name, part in others.items() if part.state_dict()}
        self.state = checkpoints.resume(path, training.recipe, graph.network, self.optimizer, self._others)
        self.step = training.processes.wrap(step)
        self._saved_at = self._read_at = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or as many without a better one as the patience allows."""
        epoch, patience = self.state["epoch"], self.training.settings.patience
        return epoch >= self.training.epochs or (patience is not None and epoch - self.state.get("best_epoch", epoch) >= patience)

    def epoch(self) -> EpochResult:
        """Train for an epoch, or the rest of one, validate, and save the state."""
        training, processes, epoch = self.training, self.training.processes, self.state["epoch"]
        start = time.monotonic()
        losses, images = self._steps(epoch)
        seconds = time.monotonic() - start
        evaluated = training.graph
        processes.share_buffers(training.graph)
        if self.ema is not None:
            processes.share_buffers(self.ema)
            evaluated = FeatureGraph(self.ema.module, (), training.graph.preprocessing).to(training.device)
        accuracy, entropy = evaluate(evaluated, training.validation, training.device, processes)
        if not math.isfinite(entropy):
            self._stop("its validation loss", entropy, epoch, None)
        score = epoch_quality(training.settings.select, epoch, accuracy, entropy)
        if score >= self.state["best_score"]:
            best = checkpoints.on_processor(evaluated.network.state_dict(), copy=True)
            self.state |= {"best_score": score, "best": best, "best_epoch": epoch + 1}
        scores = training.probe(evaluated.network) if training.probe is not None and processes.is_main else {}
        loss = losses.pop("total")
        result = EpochResult(training.role, epoch + 1, training.epochs, loss, accuracy, entropy, losses, images / seconds, scores)
        self.state["history"] = [*self.state.get("history", []), result.row()]
        self._save(epoch + 1, {"step": 0})
        if training.log is not None and processes.is_main:
            training.log(training.role, self.state["history"])
        return replace(result, epochs=epoch + 1) if self.is_over else result

    def _steps(self, epoch: int) -> tuple[dict[str, float], int]:
        """The mean losses over an epoch, ``total`` and its parts, and the number of images in the steps of this call.

        All random numbers follow from (seed, epoch), and from the rank of this process for dropout.
        """
        training, state, processes = self.training, self.state, self.training.processes
        settings, images, device = training.settings, training.images, training.device
        generator = np.random.default_rng([settings.seed, epoch])
        batches = np.array_split(generator.permutation(len(images)), math.ceil(len(images) / settings.batch))
        first = state.get("step", 0)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        totals = {name: zero + value for name, value in state.get("losses", {}).items()} if first and processes.is_main else {"total": zero}
        diverged = torch.full((), -1, device=device)
        start = self._read_at = time.monotonic()
        training.graph.train()
        training.objective.train()
        rank = () if processes.is_main else (processes.rank,)
        with seeded(device, settings.seed, epoch, *rank):
            if first:
                set_random_state(device, generator, state["random"][processes.rank])
            for step in range(first, len(batches)):
                number = epoch * len(batches) + step + 1
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(settings, number, training.epochs * len(batches), epoch, training.epochs)
                for name, value in self._update(batches[step], generator).items():
                    totals[name] = totals.get(name, zero) + value / len(images)
                diverged = torch.where((diverged < 0) & ~torch.isfinite(totals["total"]), step + 1, diverged)
                is_last = step == len(batches) - 1
                if is_last or (device.type == "cpu" and processes.count == 1) or step % _STEPS_BETWEEN_CHECKS == 0:
                    steps = [number for number in processes.gather(int(diverged)) if number > 0]  # all processes stop, or none
                    if steps:
                        self._stop("its loss", float(processes.sum(totals["total"])), epoch, min(steps))
                    if self.scaler.get_scale() < _SMALLEST_SCALE:
                        self._stop("its gradient", math.nan, epoch, step + 1)
                    if not is_last and processes.agree(time.monotonic() - self._saved_at > 60 * settings.save_minutes):
                        random = processes.gather(random_state(device, generator))
                        self._save(epoch, {"step": step + 1, "random": random, "losses": self._summed(totals)})
                    self._report(epoch, batches, (first, step + 1), totals, start)
        return self._summed(totals), sum(map(len, batches[first:]))

    def _report(self, epoch: int, batches: Sequence[Indices], steps: tuple[int, int], totals: Mapping[str, Tensor], start: float) -> None:
        """Report the losses so far, if their last reading is long enough ago. steps: the first and the next step of this call."""
        training, now = self.training, time.monotonic()
        if training.on_step is None or now - self._read_at < _SECONDS_BETWEEN_READINGS:
            return
        self._read_at = now
        first, step = steps
        images = sum(map(len, batches[first:step]))
        # The totals of a resumed epoch start with those of all processes, and contain only this one's from then on.
        share = (sum(map(len, batches[:first])) + images / training.processes.count) / len(training.images)
        losses = {name: float(value) / share for name, value in totals.items()}
        loss = losses.pop("total")
        speed = images / (now - start)
        training.on_step(StepResult(training.role, epoch + 1, training.epochs, step, len(batches), loss, losses, speed))

    def _update(self, positions: Indices, generator: np.random.Generator) -> dict[str, Tensor]:
        """One step of the optimizer; the sums of the losses over the images of this process, ``total`` and its parts."""
        settings, processes = self.training.settings, self.training.processes
        draws = self.training.augmentation.draw(len(positions), generator)
        parts = np.array_split(np.arange(len(positions)), settings.accumulate * processes.count)
        parts = parts[processes.rank * settings.accumulate :][: settings.accumulate]
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for number, rows in enumerate(parts):
            images, labels, kept = self.training.images.read(positions[rows])
            if not len(kept) and processes.count == 1:  # no image of this part can be read
                continue
            images, labels = self.training.augmentation.apply(images, labels, draws, rows[np.isin(positions[rows], kept)])
            share = len(rows) / len(positions) * processes.count  # of the mean over the batch; averaging divides by the count
            if number < len(parts) - 1:
                with processes.without_averaging(self.step):
                    losses = self._backward(images, labels, kept, share)
            else:
                losses = self._backward(images, labels, kept, share)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss * len(kept)
        if not sums:
            return sums
        if settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.training.graph.network)
        return sums

    def _backward(self, images: Tensor, labels: Tensor, positions: Indices, share: float) -> dict[str, Tensor]:
        """Add the gradient of ``share`` times the loss to that of the parameters; the losses, ``total`` and its parts, detached."""
        settings, device = self.training.settings, self.training.device
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        with autocast(settings, device):
            losses = self.step(
                images.to(device, memory_format=layout, non_blocking=True), labels.to(device), torch.from_numpy(positions).to(device)
            )
        loss = summed(losses)
        torch.autograd.backward(self.scaler.scale(loss if share == 1 else loss * share))
        return {"total": loss.detach(), **{name: part.detach() for name, part in losses.items()}}

    def _summed(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: float(self.training.processes.sum(value)) for name, value in totals.items()}

    def _save(self, epoch: int, place: Mapping[str, Any]) -> None:
        """Write the state file: training goes on in this epoch at this place."""
        finite = torch.stack([torch.isfinite(parameter).all() for parameter in self.parameters])
        if not bool(finite.all()):  # a gradient that is not finite spoils weights
            self._stop("a weight", math.nan, epoch if place["step"] else epoch - 1, place["step"] or None)
        for name in ("step", "random", "losses"):
            self.state.pop(name, None)
        parts: dict[str, checkpoints.Resumable] = {"model": self.training.graph.network, "optimizer": self.optimizer, **self._others}
        self.state |= {"epoch": epoch, **place, **{name: part.state_dict() for name, part in parts.items()}}
        if self.training.processes.is_main:
            checkpoints.save_state(self.path, self.state)
        self._saved_at = time.monotonic()

    def _stop(self, what: str, value: float, epoch: int, step: int | None) -> None:
        """Raise the KdxError of a training that diverged."""
        place = f"epoch {epoch + 1}" if step is None else f"epoch {epoch + 1} at step {step}"
        best = self.state.get("best_epoch")
        kept = f"; the weights of epoch {best}, the best until then, are {self.path}#best" if best else ""
        raise KdxError(
            f"The training of the {self.training.role} diverged in {place}: {what} is {value}.",
            f"Give a lower learning rate, and another output folder{kept}.",
        )


def evaluate(graph: FeatureGraph, images: SplitImages, device: torch.device, processes: Processes = SINGLE) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross entropy of a network on a split; the network is left in evaluation mode."""
    correct = entropy = 0.0
    graph.eval()
    with torch.no_grad():
        for positions in _chunks(len(images), processes):
            pixels, labels, _ = images.read(positions)
            logits = graph(pixels.to(device))[0].float().cpu()
            correct += float((logits.argmax(1) == labels).sum())
            entropy += float(functional.cross_entropy(logits, labels, reduction="sum"))
    correct, entropy = processes.sum(torch.tensor([correct, entropy], dtype=torch.float64, device=device)).tolist()
    return correct / len(images), entropy / len(images)


def _chunks(count: int, processes: Processes) -> Iterator[Indices]:
    """The positions that this process evaluates, at most 256 at a time."""
    yield from np.array_split(np.arange(count), math.ceil(count / 256))[processes.rank :: processes.count]
