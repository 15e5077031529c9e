"""What is logged of a training after every epoch: losses, accuracy, speed, and the scores of a fixed batch of probe images."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdx.data.splits import class_balanced_sample
from kdx.disk import write_atomic
from kdx.distill.networks import Distillation
from kdx.distill.pairing import Pair
from kdx.errors import KdxError, missing_package
from kdx.scores.compare import compare

LOGS = ("csv", "tensorboard", "wandb")
"""The kinds of log."""

Row = Mapping[str, float]
"""The figures of an epoch by name, with the epoch, counted from 1, as ``epoch``."""

Log = Callable[[str, Sequence[Row]], None]
"""log(role, rows): called after every epoch with the figures of all epochs so far."""


class Probe:
    """Scores of the student after every epoch, which show when knowledge is transferred.

    For a fixed batch of validation images, balanced over the classes, and for every pair of layers: FSS(S,T), FSS(B,T), RS(S), RS(B),
    RS(T) and the RS of one network given another (`kdx.compare`), with the teacher and, if there is one, the finished base. Their features
    are computed once. The scores of few images vary with the images, so compare epochs with one another, and runs only with the same probe
    images.

    Raises KdxError for fewer than four images.
    """

    def __init__(self, distillation: Distillation, pairs: Sequence[Pair], count: int) -> None:
        validation = distillation.images["validation"]
        labels = distillation.dataset.labels[validation.indices]
        rows = class_balanced_sample(labels, min(count, len(labels)), distillation.settings.seed)
        if len(rows) < 4 or not pairs:
            raise KdxError(
                f"The scores of {len(rows)} probe images at {len(pairs)} layers cannot be computed.",
                "Give --probe 4 or more, enough validation images, and a layer.",
            )
        pixels, kept_labels, _ = validation.read(rows)
        self._distillation, self._pixels, self._labels = distillation, pixels.to(distillation.device), kept_labels
        self._layers = [student for student, _ in pairs]
        teacher_features = self._features(distillation.trained_network("teacher"), [teacher for _, teacher in pairs])
        self._fixed = {"teacher": teacher_features}
        if distillation.has_base:
            self._fixed["base"] = self._features(distillation.trained_network("base"), self._layers)

    def __call__(self, student: nn.Module) -> dict[str, float]:
        """The scores by LAYER/SCORE."""
        features = {**self._fixed, "student": self._features(student, self._layers)}
        by_layer = {layer: {role: stack[index] for role, stack in features.items()} for index, layer in enumerate(self._layers)}
        results = compare(by_layer, self._labels.to(self._pixels.device), permutations=0)
        return {f"{layer}/{name}": score.value for layer, result in results.items() for name, score in result.scores.items()}

    def _features(self, network: nn.Module, layers: Sequence[str]) -> list[Tensor]:
        graph = self._distillation.graph(network, layers).eval()
        with torch.no_grad():
            batches = [graph(pixels)[1:] for pixels in self._pixels.split(64)]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@contextmanager
def open_logs(names: Sequence[str], folder: Path) -> Iterator[Log | None]:
    """Yield one log that writes to all of these kinds until the block ends; None without any.

    ``csv`` writes ``folder``/ROLE.csv; ``tensorboard`` and ``wandb`` are trackers of Accelerate. Raises KdxError for another kind, and if
    a package is missing.
    """
    with ExitStack() as stack:
        logs: list[Log] = []
        for name in dict.fromkeys(names):
            if name not in LOGS:
                raise KdxError(f"There is no log {name!r}.", f"Choose from: {', '.join(LOGS)}.")
            logs.append(_csv(folder) if name == "csv" else stack.enter_context(_tracker(name, folder)))

        def write(role: str, rows: Sequence[Row]) -> None:
            for log in logs:
                log(role, rows)

        yield write if logs else None


def _csv(folder: Path) -> Log:
    def write(role: str, rows: Sequence[Row]) -> None:
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(folder / f"{role}.csv", text.getvalue().encode())

    return write


@contextmanager
def _tracker(name: str, folder: Path) -> Iterator[Log]:
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        from accelerate.utils import imports
    except ModuleNotFoundError as error:
        raise missing_package("accelerate", "distill", f"The log {name}") from error
    if not getattr(imports, f"is_{name}_available")():
        raise KdxError(f"The log {name} needs a package that is not installed.", f"Install it with: pip install {name}")
    trackers: dict[str, Any] = {}

    def write(role: str, rows: Sequence[Row]) -> None:
        if role not in trackers:
            kind = LOGGER_TYPE_TO_CLASS[name]
            trackers[role] = kind(role, logging_dir=folder / name) if kind.requires_logging_directory else kind(role)
            trackers[role].start()
        *_, latest = rows
        trackers[role].log({key: value for key, value in latest.items() if key != "epoch"}, step=int(latest["epoch"]))

    try:
        yield write
    finally:
        for tracker in trackers.values():
            tracker.finish()
