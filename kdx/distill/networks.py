"""The networks of a distillation: references, initial and trained weights, recipes, and checks before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdx import models
from kdx.choices import COVER
from kdx.data.dataset import Dataset, open_data
from kdx.data.splits import class_balanced_sample, stratified_splits, validation_is_test
from kdx.distill import blocked_layout
from kdx.distill.augmentation import Augmentation
from kdx.distill.checkpoints import Recipe, TrainingData
from kdx.distill.data import SplitImages
from kdx.distill.losses import method_requirements
from kdx.distill.number_formats import CompiledGraph, check_channels_last
from kdx.distill.processes import SINGLE, Processes
from kdx.distill.reused_weights import check_weights
from kdx.distill.seeding import seeded
from kdx.distill.settings import StepCallback, TrainingSettings
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models.reference import ModelReference


@dataclass(frozen=True)
class Distillation:
    """The data, settings and references that the trainings of teacher, base and student share."""

    folder: Path
    settings: TrainingSettings
    device: torch.device
    dataset: Dataset
    images: Mapping[str, SplitImages]
    """The splits train, validation and test, and under ``student`` the images that base and student are trained on."""
    preprocessing: Preprocessing
    teacher: ModelReference
    student: ModelReference
    teacher_is_trained: bool
    """Whether the teacher comes with weights and is not trained here."""
    teacher_data: TrainingData | None
    """What a teacher that is not trained here was trained on, if known."""
    processes: Processes
    log: Callable[[str, Sequence[Mapping[str, float]]], None] | None
    """Called after every epoch of a role with the figures of all its epochs."""
    notes: tuple[str, ...]
    """Lines for the user: what was left out of the data, which weights of a file are used, and, after ``Warning:``, that existing weights
    may have seen images of the test split."""
    has_base: bool = True
    """Whether a base is trained."""
    on_step: StepCallback | None = None
    """Called within the epochs of every training."""

    @classmethod
    def prepare(
        cls,
        data: str,
        folder: Path,
        settings: TrainingSettings,
        device: torch.device,
        teacher: str,
        student: str,
        processes: Processes = SINGLE,
        log: Callable[[str, Sequence[Mapping[str, float]]], None] | None = None,
    ) -> Distillation:
        """Open the data, load the teacher and decode the splits. Raises KdxError for anything that cannot be trained."""
        dataset = replace(open_data(data), resizing=settings.resizing)
        # Local folders and files become absolute paths, so that the models file is valid from any folder.
        teacher_reference, student_reference = (
            models.parse_reference(reference).located().with_classes(len(dataset.classes)) for reference in (teacher, student)
        )
        check_trainable(student_reference)
        classes = len(dataset.classes)
        network = models.load(str(teacher_reference), classes=classes)
        loaded = [network] if student_reference.weights is None else [network, models.load(str(student_reference), classes=classes)]
        preprocessing = training_preprocessing(network, settings)
        splits = stratified_splits(dataset, settings.split_seed)
        earlier = {
            role: check_weights(role, reference.weights, dataset, splits)
            for role, reference in (("teacher", teacher_reference), ("student", student_reference))
            if reference.weights is not None
        }
        student_indices = splits["train"]
        if settings.student_images is not None:
            labels = dataset.labels[student_indices]
            student_indices = student_indices[class_balanced_sample(labels, settings.student_images, settings.seed)]
        size = preprocessing.size or (0, 0)
        images = {
            name: SplitImages(dataset, indices, size, settings.max_unreadable)
            for name, indices in (splits | {"student": student_indices}).items()
        }
        check_sizes({name: len(split) for name, split in images.items()}, data, settings, processes)
        return cls(
            folder,
            settings,
            device,
            dataset,
            images,
            preprocessing,
            teacher_reference,
            student_reference,
            teacher_is_trained=is_trained_teacher(teacher_reference, network),
            teacher_data=earlier["teacher"][0] if "teacher" in earlier else None,
            processes=processes,
            log=log,
            notes=(
                dataset.note,
                *(model.note for model in loaded),
                *(f"Warning: {warning}" for _, warning in earlier.values() if warning is not None),
            ),
        )

    def reference(self, role: str) -> ModelReference:
        """The reference of a role's architecture; base and student have the same."""
        return self.teacher if role == "teacher" else self.student

    def weights_path(self, role: str) -> Path:
        """The path of the trained weights of a role."""
        return self.folder / f"{role}.safetensors"

    def initial_network(self, role: str) -> nn.Module:
        """The network of a role with its initial weights, which are the same for base and student.

        A network that the user's function returns can have channels last; only the settings decide whether it is trained so.
        """
        with seeded(self.device, self.settings.seed, int(role == "teacher")):
            module = models.load(str(self.reference(role)), classes=len(self.dataset.classes)).module
        module.to(self.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return module

    def network_to_train(self, role: str) -> nn.Module:
        """`initial_network`. Raises KdxError if PyTorch cannot train it in the memory layout of the settings."""
        module = self.initial_network(role)
        if self.settings.channels_last:
            check_channels_last(module, self.device)
        return module

    def trained_network(self, role: str) -> nn.Module:
        """The network of a role with its trained weights, for evaluation only."""
        reference = str(self.reference(role).with_weights(f"{role}.safetensors"))
        module = models.load(reference, classes=len(self.dataset.classes), folder=self.folder).module
        return module.to(self.device).requires_grad_(False)

    def graph(self, module: nn.Module, layers: Sequence[str] = ()) -> FeatureGraph:
        """The graph of a network and its layers. Images are decoded at their final size, so the graph does not resize them."""
        return FeatureGraph(module, layers, self._without_resizing).to(self.device)

    def training_graph(self, module: nn.Module, layers: Sequence[str] = ()) -> FeatureGraph:
        """`graph` in the memory layout and the form, compiled or not, that the settings choose for training.

        On a processor, networks of convolutions compute in oneDNN's layout (`kdx.distill.blocked_layout`) unless a setting excludes it.
        """
        if self.settings.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.settings.compile:
            return CompiledGraph(module, layers, self._without_resizing).to(self.device)
        size, settings = self.preprocessing.size or (0, 0), self.settings
        excluded = settings.channels_last or settings.precision != "float32" or method_requirements(settings.method).pre_activations
        if excluded or not blocked_layout.suits(module, size):
            return self.graph(module, layers)
        frozen = not any(weight.requires_grad for weight in module.parameters())
        return blocked_layout.BlockedGraph(module, layers, self._without_resizing, size if frozen else None)

    @property
    def _without_resizing(self) -> Preprocessing:
        """The preprocessing of images that are decoded at their final size."""
        return replace(self.preprocessing, size=None)

    def epochs(self, role: str) -> int:
        """The number of epochs of a role's training."""
        return self.settings.teacher_epochs or self.settings.epochs if role == "teacher" else self.settings.epochs

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation of the training images."""
        return Augmentation(self.settings, self.preprocessing.size or (0, 0), len(self.dataset.classes))

    def recipe(self, role: str) -> Recipe:
        """Everything that the weights of the teacher or the base depend on."""
        settings, reference = self.settings, self.reference(role)
        common = ("batch", "optimizer", "learning_rate", "weight_decay", "seed", "split_seed", "augment", "flip")
        entries: dict[str, Any] = {
            "data": self.dataset.fingerprint,
            "architecture": str(reference.with_weights(None)),
            "initial": models.weights_hash(self.initial_network(role)) if reference.is_trained else None,
            "epochs": self.epochs(role),
            "images": None if role == "teacher" else settings.student_images,
            "size": list(self.preprocessing.size or ()),
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            **{key: getattr(settings, key) for key in common},
            **settings.later_entries(),
        }
        if self.processes.count > 1:
            entries["processes"] = self.processes.count
        if settings.resizing != COVER:  # kdx 0.1.0 had no other
            entries["resizing"] = [settings.resizing.mode, settings.resizing.interpolation]
        if validation_is_test(self.dataset):  # kdx 0.1.0 did not have this rule
            entries["validation_is_test"] = True
        return Recipe(entries, lambda: self.dataset.fingerprint_of_0_1_0)

    def merge_unreadable(self) -> None:
        """Add the unreadable images that the other processes have come upon."""
        for part in self.images.values():
            for unreadable in self.processes.gather(part.unreadable):
                part.unreadable |= unreadable

    @property
    def unreadable(self) -> dict[str, str]:
        """The reason for each unreadable image of any split, by its id."""
        return {name: reason for part in self.images.values() for name, reason in part.unreadable.items()}


def check_sizes(sizes: Mapping[str, int], data: str, settings: TrainingSettings, processes: Processes = SINGLE) -> None:
    """Raise KdxError for a split without images, and for training images that cannot fill the parts of their batches.

    sizes: the number of images of each split that can be read, and of ``student``, the part of ``train`` for base and student.
    """
    parts = settings.accumulate * processes.count
    for name, size in sizes.items():
        if size < 2:
            raise KdxError(f"The {name} split of {data} has {size} readable images.", "Give more images: every split needs at least two.")
        smallest = size // math.ceil(size / settings.batch)
        if name in ("train", "student") and parts > 1 and smallest < 2 * parts:
            raise KdxError(
                f"A batch of {smallest} of the {size} training images cannot be split into {parts} parts.",
                "Accumulate fewer parts, start fewer processes, or give more images.",
            )


def check_trainable(student: ModelReference) -> None:
    """Raise KdxError for a student that cannot be trained."""
    if student.source == "pt2":
        raise KdxError(f"{student} is a program for inference and cannot be trained.", "Name the student's architecture instead.")


def is_trained_teacher(reference: ModelReference, network: models.Network) -> bool:
    """Whether a teacher is used as it is: its reference has weights for these classes, or is a trained network by itself."""
    return (reference.weights is not None and not reference.has_new_head) or (reference.source in ("hf", "pt2") and network.trained)


def training_preprocessing(teacher: models.Network, settings: TrainingSettings) -> Preprocessing:
    """The preprocessing of all networks of a distillation: the teacher's, at the size of the settings if they state one.

    Raises KdxError if neither states a size.
    """
    size = settings.image_size or teacher.preprocessing.size
    if size is None:
        raise KdxError(f"{teacher.reference} does not state the size of its images.", "Give the image size.")
    return replace(teacher.preprocessing, size=size)


def check_networks(distillation: Distillation) -> None:
    """Raise KdxError for weights or logits that are not finite, for numbers of classes that do not match, and for a network that PyTorch
    cannot train in the memory layout of the settings.

    Without this check, such errors would appear only when the student's training starts, after hours of training the teacher.
    """
    classes = len(distillation.dataset.classes)
    widths = {}
    for role in ("teacher", "student"):
        is_used_as_it_is = role == "teacher" and distillation.teacher_is_trained
        module = distillation.initial_network(role) if is_used_as_it_is else distillation.network_to_train(role)
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise KdxError(
                    f"The weights of the {role} are not finite numbers: {key}.", "Give weights from a training that did not diverge."
                )
        graph = distillation.graph(module).eval()
        with torch.no_grad():
            logits = graph(distillation.images["validation"].first(2)[0].to(distillation.device))[0]
        if not torch.isfinite(logits).all():
            raise KdxError(
                f"The {role}'s logits are not finite numbers.", "Give sound weights, and the preprocessing they were trained with."
            )
        widths[role] = logits.shape[1]
        if logits.shape[1] < classes:
            raise KdxError(f"The {role} has {logits.shape[1]} classes, and the data has {classes}.", "Give the network the data's classes.")
    if widths["teacher"] != widths["student"]:
        raise KdxError(
            f"The teacher has {widths['teacher']} classes and the student {widths['student']}.",
            f"Both need the {classes} classes of the data.",
        )
