"""The reference images that an explainer file contains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdx.data.dataset import open_data
from kdx.data.images import load_references
from kdx.data.splits import class_balanced_sample
from kdx.explain.graph import ReferenceImages
from kdx.models.models_file import ModelsFile, read_models
from kdx.progress import console
from kdx.runs.split import choose_split, with_recorded_data


@dataclass(frozen=True, eq=False)
class ChosenReferences:
    """Reference images, their ids in the data set, and the names of the classes that their labels index."""

    images: ReferenceImages
    ids: tuple[str, ...]
    classes: tuple[str, ...]


def choose_references(data: str, count: int, seed: int, models: ModelsFile, size: tuple[int, int]) -> ChosenReferences:
    """``count`` class-balanced images of the train split of ``data``, of height and width ``size``; all images if there are fewer.

    models: names the classes, the training data and the seed of their split, as in `kdx.runs.split.choose_split`. seed: of the choice,
    and of the split where ``models`` does not state one. Raises KdxError for data that cannot be opened, and for a corrupt image.
    """
    dataset = replace(open_data(data, models.classes or None), resizing=models.resizing)
    if dataset.note:
        console().print(dataset.note, markup=False, soft_wrap=True)
    pool = choose_split(dataset, with_recorded_data(models), "train", seed).pool
    rows = pool[class_balanced_sample(dataset.labels[pool], count, seed)]
    images = ReferenceImages(load_references(dataset, rows, size), torch.from_numpy(dataset.labels[rows]))
    return ChosenReferences(images, tuple(dataset.ids[row] for row in rows), dataset.classes)


def models_file_of(student: str) -> ModelsFile:
    """The models file that the student's reference ``MODELS.toml:ROLE`` names, or one that states nothing else."""
    path, _, _ = student.rpartition(":")
    return read_models(path) if path.endswith(".toml") else ModelsFile(Path(), None, student)
