"""The class embeddings that an option or a models file states as the target, in place of one-hot labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdx.choices import LABELS, TARGET_KINDS
from kdx.data.class_embeddings import ClassEmbeddings, read_class_embeddings
from kdx.errors import KdxError
from kdx.models.models_file import ModelsFile


def stated_target(option: str | Path | None, models: ModelsFile) -> tuple[str | None, Path]:
    """The stated target and the folder to which its path is relative. The target is None for labels.

    option: relative to the current folder; None for the models file's ``targets``.
    """
    stated, folder = (option, Path()) if option is not None else (models.targets, models.path.parent)
    return (None if stated is None or str(stated) == LABELS else str(stated)), folder


def class_table(option: str | Path | None, models: ModelsFile, classes: Sequence[str]) -> ClassEmbeddings | None:
    """The class embeddings that are stated; None for labels. Raises KdxError for a target that depends on each image."""
    stated, folder = stated_target(option, models)
    if stated is None:
        return None
    if stated.partition(":")[0] in TARGET_KINDS:
        raise KdxError(
            f"The target {stated} has a row per image, which only a run over a data set computes.",
            "Give a file of class embeddings, or leave the target out; in Python, give the rows as labels.",
        )
    if not classes:
        raise KdxError(f"The target {stated} has a row per class, and the classes are not known.", "Write classes in the models file.")
    return read_class_embeddings(folder / Path(stated).expanduser(), classes)


def rows_of(labels: Tensor, embeddings: ClassEmbeddings) -> Tensor:
    """The rows [n, e] of labels [n]; an embedding [n, e] is unchanged. Raises KdxError for a label that is not a class."""
    if labels.ndim != 1 or labels.is_floating_point():
        return labels
    count = len(embeddings.rows)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise KdxError(
            f"A label is not one of the {count} classes of {embeddings.file}.", f"Give labels from 0 to {count - 1}, or class names."
        )
    return torch.from_numpy(embeddings.rows).to(labels.device)[labels.long()]
