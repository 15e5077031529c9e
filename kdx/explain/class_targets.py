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


def is_by_image(stated: str | None) -> bool:
    """Whether a stated target has a row per image."""
    return stated is not None and stated.partition(":")[0] in TARGET_KINDS


def class_table(option: str | Path | None, models: ModelsFile, classes: Sequence[str]) -> ClassEmbeddings | None:
    """The class embeddings that are stated; None for labels. Raises KdxError for a target that depends on each image."""
    stated, folder = stated_target(option, models)
    if stated is None:
        return None
    if is_by_image(stated):
        raise _by_image(stated)
    if not classes:
        raise KdxError(f"The target {stated} has a row per class, and the classes are not known.", "Write classes in the models file.")
    return read_class_embeddings(folder / Path(stated).expanduser(), classes)


def _by_image(stated: str) -> KdxError:
    return KdxError(
        f"The target {stated} has a row per image, which only a run over a data set computes.",
        "Give a file of class embeddings, or leave the target out; in Python, give the rows as labels.",
    )


def explainer_target(models: ModelsFile) -> ClassEmbeddings | str | None:
    """The target of a models file for `rows_of`: class embeddings, the name of a target by image, or None for labels."""
    stated, _ = stated_target(None, models)
    return stated if is_by_image(stated) else class_table(None, models, models.classes)


def rows_of(labels: Tensor, target: ClassEmbeddings | str | None) -> Tensor:
    """The rows [n, e] of labels [n]; an embedding [n, e] is unchanged, and so are labels if there is no target.

    Raises KdxError for a label that is not a class, and for labels in place of the rows of a target by image.
    """
    if target is None or labels.ndim != 1 or labels.is_floating_point():
        return labels
    if isinstance(target, str):
        raise _by_image(target)
    embeddings = target
    count = len(embeddings.rows)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise KdxError(
            f"A label is not one of the {count} classes of {embeddings.file}.", f"Give labels from 0 to {count - 1}, or class names."
        )
    return torch.from_numpy(embeddings.rows).to(labels.device)[labels.long()]
