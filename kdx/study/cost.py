"""What a study will cost: its trainings, their epochs, the passes of explaining, and the time, from a batch or from complete jobs."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from kdx import models
from kdx.data.dataset import open_data
from kdx.data.splits import stratified_splits
from kdx.distill.train import training_device
from kdx.export.graphs import FeatureGraph
from kdx.study.grid import Grid, Job, JobKind


@dataclass(frozen=True)
class Cost:
    """The jobs of one kind with the same networks and data.

    done: how many of the ``jobs`` are complete. epochs: of a training. passes: of images through networks when one cell is explained, with
    the teacher's and the base's shared by the cells. seconds: of a job. source: ``stored`` where complete jobs of this study took this
    long on average, ``batch`` where it follows from the time of one batch.
    """

    kind: JobKind
    data: str
    networks: tuple[str, ...]
    jobs: int
    done: int
    epochs: int
    seconds: float
    source: Literal["stored", "batch"]

    @property
    def left(self) -> float:
        """The seconds of processor time that the jobs that are not complete take in one process."""
        return (self.jobs - self.done) * self.seconds


def costs(grid: Grid, complete: Mapping[str, float]) -> list[Cost]:
    """The cost of a grid. complete: the seconds that each complete job took, by key.

    The time of a batch is that of the forward and backward passes of a training step, and of the forward passes of validating and
    explaining, on random images of the size and the batch of the training. It does not contain reading and augmenting images, the
    distillation loss, maps, scores, pictures and pages, which take most of the time of very small networks.
    """
    groups: dict[tuple[JobKind, str, tuple[str, ...]], list[Job]] = defaultdict(list)
    for job in grid.jobs:
        networks = (job.student,) if job.kind in ("teacher", "base") else (job.teacher, job.student)
        groups[job.kind, job.data, networks].append(job)
    timer = _Timer()
    result = []
    for (kind, data, names), jobs in groups.items():
        first = jobs[0]
        seconds = [complete[job.key] for job in jobs if job.key in complete]
        mean = sum(seconds) / len(seconds) if seconds else timer.job(first)
        epochs = first.settings.teacher_epochs if kind == "teacher" and first.settings.teacher_epochs else first.settings.epochs
        result.append(Cost(kind, data, names, len(jobs), len(seconds), epochs, mean, "stored" if seconds else "batch"))
    return result


class _Timer:
    """Times batches, each kind once."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, int, tuple[int, int], int], tuple[float, float]] = {}
        self._counts: dict[tuple[str, int], dict[str, int]] = {}
        self._classes: dict[str, int] = {}

    def job(self, job: Job) -> float:
        """The seconds of a job."""
        counts = self._images(job)
        batch, settings = job.settings.batch, job.settings
        if job.kind == "teacher":
            epochs, images = settings.teacher_epochs or settings.epochs, counts["train"]
        else:
            epochs, images = settings.epochs, settings.student_images or counts["train"]
        step, forward = self._step(job, job.student)
        seconds = epochs * (math.ceil(images / batch) * step + math.ceil(counts["validation"] / batch) * forward)
        if job.kind in ("assistant", "cell"):
            seconds += epochs * math.ceil(images / batch) * self._step(job, job.teacher)[1]
        if job.kind == "cell":
            seconds += math.ceil(counts["test"] / batch) * forward
        return seconds

    def _images(self, job: Job) -> dict[str, int]:
        key = job.data, job.settings.split_seed
        if key not in self._counts:
            dataset = open_data(job.data)
            self._classes[job.data] = len(dataset.classes)
            self._counts[key] = {name: len(indices) for name, indices in stratified_splits(dataset, key[1]).items()}
        return self._counts[key]

    def _step(self, job: Job, reference: str) -> tuple[float, float]:
        """The seconds of a training step and of a forward pass of one batch."""
        classes, batch = self._classes[job.data], job.settings.batch
        preprocessing = job.preprocessing
        size = preprocessing.size or (0, 0)
        key = reference, batch, size, classes
        if key not in self._steps:
            module = models.load(reference, classes=classes).module
            device = training_device(job.extras.device)
            graph = FeatureGraph(module, (), replace(preprocessing, size=None)).to(device)
            images, labels = torch.rand(batch, 3, *size, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
            self._steps[key] = (_seconds(_trained(graph, images, labels)), _seconds(_evaluated(graph, images)))
        return self._steps[key]


def _trained(graph: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    trainable = any(parameter.requires_grad for parameter in graph.parameters())

    def step() -> torch.Tensor:
        graph.train()
        loss = functional.cross_entropy(graph(images)[0], labels)
        if trainable:
            torch.autograd.backward(loss)
        return loss.detach()

    return step


def _evaluated(graph: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        graph.eval()
        with torch.no_grad():
            logits: torch.Tensor = graph(images)[0]
        return logits

    return step


def _seconds(step: Callable[[], torch.Tensor]) -> float:
    """The seconds of a call, after a first call that prepares it: the smaller of two. Reading a number waits for a GPU."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        float(step().sum())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
