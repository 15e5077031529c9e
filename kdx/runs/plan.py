"""What a run explains, and how: its options and its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.choices import DecoderName, Interpolation, RatioName, ResizeMode, Resizing, StoredPrecision
from kdx.data.batches import random_batches
from kdx.data.dataset import Dataset, open_data
from kdx.data.gpu_decoder import GpuDecoder, open_gpu_decoder
from kdx.data.splits import class_balanced_sample
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.explain.explainer_file import describe_explainer, no_reference_mode, paired_layers
from kdx.explain.networks import networks_of
from kdx.explain.settings import Settings
from kdx.explain.shared_features import SharedFeatures
from kdx.features.arrays import MIN_IMAGES, check_images
from kdx.models.layer_pairs import LayerNames, parse_layers
from kdx.models.models_file import ModelsFile, read_models
from kdx.models.network import INITIALISED, Network, check_initialised
from kdx.models.reference import parse_reference
from kdx.roles import BASELINE
from kdx.runs.gallery_choice import BALANCED, GalleryChoice
from kdx.runs.grouping import MAX_GROUPS, Grouping, grouping_of
from kdx.runs.split import SplitChoice, choose_split, with_recorded_data
from kdx.runs.targets import RunTarget, run_target
from kdx.runtimes.choice import choose, is_file

MAX_MINUTES = 60.0
"""The minutes of sweeps over all pairs of images beyond which the geometry ``auto`` is not ``whole``."""

REFERENCE_IMAGES = 256
"""The reference images of the geometry ``reference``, unless another number is given."""

_ALIGNED = 16


@dataclass(frozen=True, kw_only=True)
class RunOptions(Settings):
    """How a run explains: the settings of `kdx.Explainer` and those below.

    batch: images that are decoded, and go through the networks, at once. With the geometry ``batch`` these are also the images whose
    geometry makes one set of maps; with ``whole`` batch and chunk are rounded up to a multiple of 16 and do not change a result.
    reference_images: the number m of class-balanced images among which UniCAM maps every image with the geometry ``reference``; scores,
    and the maps that add up to them, are those of the batches. A number above 0
    selects this geometry, and 0 stands for REFERENCE_IMAGES if it is selected otherwise.
    stored_precision: the number format of the features that the geometry ``whole`` stores. keep_features: whether they are kept.
    project: with K > 0, features are projected to K random channels before they are stored: the squared distances then have a relative
    standard error of at most sqrt(2/K). max_disk: the gigabytes that features and distances may take; by default half of the free space.
    max_minutes: the time that the sweeps over all pairs of images may take by estimate, by default MAX_MINUTES. Beyond these two limits
    ``auto`` selects the geometry ``reference``.
    base: ``none`` leaves out the base of the models file.
    target: what relevance is measured against in place of labels (`kdx.runs.targets`), by default as the models file states.
    decoder: the decoder of image files (`kdx.choices.DecoderName`); Pillow always decodes the pictures of the page.
    resize, interpolation: how images are brought to the networks' size, by default as the models file states.
    ratios: ``summed`` for one score from the inner products of all batches, or ``mean`` for the mean of the batches' scores, with the
    geometry ``batch``.
    max_classes: the most classes for which scores per class are computed; 0 for none. groups: a column of the data's table, or of
    groups_file, whose values divide the images into groups that get scores of their own (`kdx.runs.grouping`).
    split: ``test``, ``validation``, ``train`` or ``all``. None takes ``test`` of the data that the models were trained on, and all of any
    other data. max_unreadable: the share of corrupt images above which the run fails; one image always passes, unless the share is 0.
    random_baseline: whether FSS(S,T) has a baseline, the FSS of the student's architecture with random weights, which costs one more pass.
    None computes it if there is a teacher and no base, and the student is a model reference whose architecture kdx can initialise.
    gallery, gallery_order, gallery_images: the images on the page (`kdx.runs.gallery_choice.GalleryChoice`). workers: threads that decode
    the next batches while one is explained; None takes one per core, 0 decodes each batch when it is needed.
    """

    batch: int = 64
    reference_images: int = 0
    stored_precision: StoredPrecision = "float32"
    keep_features: bool = False
    project: int = 0
    max_disk: float | None = None
    max_minutes: float | None = None
    random_baseline: bool | None = None
    base: str | None = None
    target: str | Path | None = None
    decoder: DecoderName = "pillow"
    resize: ResizeMode | None = None
    interpolation: Interpolation | None = None
    ratios: RatioName = "summed"
    max_classes: int = MAX_GROUPS
    groups: str | None = None
    groups_file: Path | None = None
    split: str | None = None
    max_unreadable: float = 0.01
    gallery: int = 60
    gallery_order: str = BALANCED
    gallery_images: tuple[str, ...] = ()
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stored_precision not in get_args(StoredPrecision):
            raise ValueError(f"no stored precision {self.stored_precision!r}")
        if self.decoder not in get_args(DecoderName):
            raise ValueError(f"no decoder {self.decoder!r}")
        if self.ratios not in get_args(RatioName):
            raise ValueError(f"no ratios {self.ratios!r}")
        if self.ratios == "mean" and self.geometry != "batch":
            raise KdxError("The mean of the batches' scores needs the geometry batch.", "Give --geometry batch, or leave --ratios out.")

    def resizing(self, default: Resizing) -> Resizing:
        """``resize`` and ``interpolation``, where they are given, in place of those of ``default``."""
        return Resizing(self.resize or default.mode, self.interpolation or default.interpolation)

    @property
    def gallery_choice(self) -> GalleryChoice:
        return GalleryChoice(self.gallery, self.gallery_order, self.gallery_images)


def aligned(count: int) -> int:
    """The number of images in a pass of the geometry ``whole`` that contains at least ``count``: a multiple of 16.

    Runtimes compute the last images of other passes with other instructions, and the last bit of a result would depend on the batch.
    """
    return -(-count // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Plan:
    """What a run explains: which images, with which networks, at which layers."""

    data: str
    models: ModelsFile
    dataset: Dataset
    split: SplitChoice
    layers: dict[str, LayerNames]
    options: RunOptions
    own_target: RunTarget | None = None
    grouping: Grouping | None = None

    @classmethod
    def of(cls, data: str, models: Path, layers: Sequence[str], options: RunOptions) -> Plan:
        _check_networks(models, options)
        models_file = _from_explainer_file(models) if is_file(models) else with_recorded_data(read_models(models)).with_base(options.base)
        return cls.with_models(data, models_file, layers, options)

    @classmethod
    def with_models(
        cls, data: str, models_file: ModelsFile, layers: Sequence[str], options: RunOptions, dataset: Dataset | None = None
    ) -> Plan:
        """The plan for the contents of a models file, which need not exist. dataset: the data, if they are open already."""
        _check_references(options)
        _check_storage(options)
        dataset = replace(
            open_data(data, models_file.classes or None) if dataset is None else dataset,
            resizing=options.resizing(models_file.resizing),
            decoder=gpu_decoder(options),
            draft=options.decoder == "pillow-draft",
        )
        split = choose_split(dataset, models_file, options.split, options.seed)
        check_images(len(split.indices))
        target = run_target(options.target, models_file, dataset, split.indices, split.pool, options.device)
        grouping = grouping_of(dataset, split.indices, options.groups, options.groups_file)
        plan = cls(data, models_file, dataset, split, parse_layers(layers or models_file.layers), options, target, grouping)
        names = [dataset.ids[index] for index in plan.indices] if options.gallery_images else ()
        options.gallery_choice.check(names, models_file.references, plan.layers, score_maps=options.features == "raw")
        if options.random_baseline:
            plan._check_baseline()
        return plan

    @property
    def indices(self) -> NDArray[np.int64]:
        """The images to explain, as rows of the data set."""
        return self.split.indices

    @cached_property
    def batches(self) -> list[NDArray[np.int64]]:
        """The batches of the geometries ``batch`` and ``reference``: positions in ``indices``."""
        return random_batches(self.dataset.labels[self.indices], self.options.batch, self.options.seed)

    def target(self, indices: NDArray[np.int64]) -> Tensor:
        """The target of images, which are rows of the data set: their labels [n], or the rows [n, e] of another target."""
        return torch.from_numpy(self.dataset.labels[indices]) if self.own_target is None else self.own_target.rows(indices)

    @cached_property
    def widest(self) -> int:
        """The number of images in the largest batch."""
        return max(map(len, self.batches))

    @property
    def reference_count(self) -> int:
        """The number of reference images: as many as requested, or all that there are."""
        return min(self.options.reference_images or REFERENCE_IMAGES, len(self.split.pool))

    def references(self) -> NDArray[np.int64]:
        """The reference images, as rows of the data set."""
        labels = self.dataset.labels[self.split.pool]
        return self.split.pool[class_balanced_sample(labels, self.reference_count, self.options.seed)]

    def _check_baseline(self) -> None:
        """Raise KdxError if the networks have no random baseline."""
        if "teacher" not in self.models.references:
            raise KdxError(
                "The random baseline is compared with the teacher, and there is none.", "Name a teacher, or leave the baseline out."
            )
        if is_file(self.models.student):
            raise KdxError("An exported file cannot get random weights.", "Name the student by a model reference.")
        check_initialised(parse_reference(self.models.student))

    def _has_baseline(self) -> bool:
        """Whether the run compares random weights with the teacher."""
        references = self.models.references
        if self.options.random_baseline is None:
            return "teacher" in references and "base" not in references and _is_architecture(self.models.student)
        return self.options.random_baseline

    def explainer(self, folder: Path | None, announce: Callable[[str], None], shared: SharedFeatures | None = None) -> Explainer:
        """The Explainer of the networks. folder: where exported networks are written, by default a temporary folder. announce: prints a
        line about weights."""
        models = self.models
        if is_file(models.path):
            if self.options.reference_images or self.options.geometry == "reference":
                raise no_reference_mode(describe_explainer(models.path))
            return Explainer.of({}, self.layers.values(), self.options, folder=folder, file=models.path)
        networks = networks_of(models)
        if self._has_baseline():
            networks[BASELINE] = models.untrained(self.options.seed)
            announce("The baseline of FSS: the student's architecture with random weights, in one more pass.")
        for role, network in networks.items():
            if isinstance(network, Network) and network.note:
                announce(f"{role.capitalize()}: {network.note}")
        options = self.options
        if options.chunk is not None and options.geometry in ("auto", "whole"):
            options = replace(options, chunk=aligned(options.chunk))
        return Explainer.of(networks, self.layers.values(), options, folder=folder, classes=self.dataset.classes, shared=shared)


def gpu_decoder(options: RunOptions) -> GpuDecoder | None:
    """The decoder on the run's GPU, if it is chosen. Raises KdxError if it cannot run."""
    if options.decoder != "torchvision-cuda":
        return None
    return open_gpu_decoder(choose("eager", options.device).device)


def _is_architecture(reference: str) -> bool:
    return not is_file(reference) and parse_reference(reference).source in INITIALISED


def _check_networks(models: Path, options: RunOptions) -> None:
    """KdxError for an explainer file whose base is to be left out, or to which a random baseline is to be added."""
    if options.base is not None and is_file(models):
        raise KdxError("An explainer file always runs all of its networks.", "Give the models file, or export without --base.")
    if options.random_baseline and is_file(models):
        raise KdxError("An explainer file runs only the networks that it contains.", "Give the models file, or leave the baseline out.")


def _check_references(options: RunOptions) -> None:
    """KdxError for a reference set that is too small, or beside another geometry."""
    if options.reference_images and options.reference_images < MIN_IMAGES:
        raise KdxError(f"A reference set of {options.reference_images} is too small.", f"Give --reference {MIN_IMAGES} or more, or 0.")
    if options.reference_images and options.geometry not in ("auto", "reference"):
        raise KdxError(
            f"A reference set does not apply to the geometry {options.geometry}.", "Give --geometry reference, or leave --reference out."
        )


def _check_storage(options: RunOptions) -> None:
    """KdxError for limits of a geometry that is not chosen, and for choices about stored features with a geometry that stores none."""
    compares_sets = options.geometry in ("batch", "reference") or options.reference_images > 0
    if options.max_disk is not None and compares_sets:
        raise KdxError("Only the geometry whole stores features and distances.", "Give --geometry whole or auto, or leave --max-disk out.")
    if options.max_minutes is not None and (compares_sets or options.geometry == "whole"):
        raise KdxError("Only the choice of the geometry has a limit in time.", "Give --geometry auto, or leave --max-minutes out.")
    stores = options.stored_precision != "float32" or options.keep_features or options.project
    if stores and compares_sets:
        raise KdxError(
            "Only the geometry whole stores features.", "Give --geometry whole, or leave --store, --keep-features and --project out."
        )


def _from_explainer_file(path: Path) -> ModelsFile:
    """The contents of a models file for the networks in an explainer file."""
    file = describe_explainer(path)
    if file.references is not None:
        count = len(file.references.labels)
        raise KdxError(
            f"{path} compares each image with its own {count} reference images, and a run measures the images of its data.",
            "Give the networks themselves with --geometry reference, or use the file with kdx.Explainer(file=...).",
        )
    references = {role: network.reference for role, network in file.networks.items()}
    layers = tuple(map(str, paired_layers(file).values()))
    return ModelsFile(path, references.get("base"), references["student"], references.get("teacher"), layers, file.classes)
