"""What is logged of a training after every epoch: losses, accuracy, speed, and the scores of a fixed batch of probe images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from kdx.data.splits import class_balanced_sample
from kdx.disk import csv_text, write_atomic
from kdx.distill.networks import Distillation
from kdx.distill.pairing import Pair
from kdx.distill.probe import Probe
from kdx.errors import KdxError, missing_package
from kdx.models.layer_pairs import LayerNames
from kdx.models.network import Network

LOGS = ("csv", "tensorboard", "wandb")
"""The kinds of log."""

Row = Mapping[str, float]
"""The figures of an epoch by name, with the epoch, counted from 1, as ``epoch``."""

Log = Callable[[str, Sequence[Row]], None]
"""log(role, rows): called after every epoch with the figures of all epochs so far."""


def validation_probe(distillation: Distillation, pairs: Sequence[Pair], count: int) -> Callable[[nn.Module], dict[str, float]]:
    """A function that returns the scores of a student by LAYER/SCORE (`kdx.Probe`), with the finished base and teacher.

    The images are ``count`` validation images, balanced over the classes. Raises KdxError for fewer than four images.
    """
    validation = distillation.images["validation"]
    labels = distillation.dataset.labels[validation.indices]
    rows = class_balanced_sample(labels, min(count, len(labels)), distillation.settings.seed)
    if len(rows) < 4 or not pairs:
        raise KdxError(
            f"The scores of {len(rows)} probe images at {len(pairs)} layers cannot be computed.",
            "Give --probe 4 or more, enough validation images, and a layer.",
        )
    pixels, kept_labels, _ = validation.read(rows)
    preprocessing = replace(distillation.preprocessing, size=None)  # images are decoded at their final size
    networks = {
        role: Network(role, distillation.trained_network(role), preprocessing)
        for role in ("base", "teacher")
        if role == "teacher" or distillation.has_base
    }
    probe = Probe(
        networks.get("base"),
        networks["teacher"],
        pixels,
        kept_labels,
        [LayerNames(student, student, teacher) for student, teacher in pairs],
    )
    return lambda student: probe(Network("student", student, preprocessing)).row()


@contextmanager
def open_logs(names: Sequence[str], folder: Path) -> Iterator[Log | None]:
    """Yield one log that writes to all of these kinds until the block ends; None without any.

    ``csv`` writes ``folder``/ROLE.csv; ``tensorboard`` and ``wandb`` are trackers of Accelerate. Raises KdxError in the same cases as
    `check_logs`.
    """
    check_logs(names)
    with ExitStack() as stack:
        logs: list[Log] = []
        for name in dict.fromkeys(names):
            logs.append(_csv(folder) if name == "csv" else stack.enter_context(_tracker(name, folder)))

        def write(role: str, rows: Sequence[Row]) -> None:
            for log in logs:
                log(role, rows)

        yield write if logs else None


def check_logs(names: Sequence[str]) -> None:
    """Raise KdxError for a log that does not exist, and for one whose package is missing."""
    for name in names:
        if name not in LOGS:
            raise KdxError(f"There is no log {name!r}.", f"Choose from: {', '.join(LOGS)}.")
        if name == "csv":
            continue
        try:
            from accelerate.utils import imports
        except ModuleNotFoundError as error:
            raise missing_package("accelerate", "distill", f"The log {name}") from error
        if not getattr(imports, f"is_{name}_available")():
            raise KdxError(f"The log {name} needs a package that is not installed.", f"Install it with: pip install {name}")


def _csv(folder: Path) -> Log:
    def write(role: str, rows: Sequence[Row]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        write_atomic(folder / f"{role}.csv", csv_text(columns, ([row.get(name) for name in columns] for row in rows)).encode())

    return write


@contextmanager
def _tracker(name: str, folder: Path) -> Iterator[Log]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

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
