"""The images that a run explains, and which of them were used in training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdx.data.dataset import Dataset, located, source_of
from kdx.data.splits import stratified_splits, validation_is_test
from kdx.distill.checkpoints import read_training_data
from kdx.errors import KdxError
from kdx.models.models_file import ModelsFile
from kdx.models.reference import parse_reference
from kdx.models.weights import split_key
from kdx.runtimes.choice import is_file

_Relation = Literal["same", "changed", "other", "unknown"]


@dataclass(frozen=True)
class SplitChoice:
    """The split that a run explains.

    indices: its images, as rows of the data set. pool: the rows from which a reference set is drawn: the train split, or all of the data.
    used: whether each row of the data set was used in training, that is, to fit the weights (train) or to choose them (validation); None
    where that is not known. validation_is_test: whether the data's validation images are the test split (`validation_is_test`).
    """

    name: str
    indices: NDArray[np.int64]
    pool: NDArray[np.int64]
    used: NDArray[np.bool_] | None
    validation_is_test: bool
    description: str
    """One sentence for the terminal: which split of which data, and its number of images."""
    reason: str = ""
    """Why images may have been used in training although the data are not those of the training, as a sentence, or empty."""
    advice: str = ""
    """How to explain new images, as a sentence, or empty."""

    def trained_on(self, indices: NDArray[np.int64]) -> int | None:
        """The number of these rows that were used in training; None where it is not known."""
        return None if self.used is None else int(self.used[indices].sum())

    def lines(self) -> list[str]:
        """The lines for the terminal: the description, and a warning where the images were or may have been used in training."""
        warning = training_warning(self.trained_on(self.indices), len(self.indices))
        if warning is None:
            return [self.description]
        return [self.description, " ".join(filter(None, ("Warning:", self.reason, warning, self.advice)))]


def training_warning(trained_on: int | None, images: int) -> str | None:
    """The sentences about ``images`` explained images of which ``trained_on`` were used in training (None: not known), or None for 0."""
    if trained_on == 0:
        return None
    if trained_on is None:
        return (
            f"It is not known whether the {images:,} images explained were used in training. If they were, their accuracies, scores and "
            "maps do not hold for new images."
        )
    subject = f"All {images:,} images explained" if trained_on == images else f"{trained_on:,} of the {images:,} images explained"
    return (
        f"{subject} {'was' if trained_on == 1 else 'were'} used in training, to fit the weights or to choose them. Their accuracies, "
        "scores and maps do not hold for new images."
    )


def choose_split(dataset: Dataset, models: ModelsFile, split: str | None, seed: int) -> SplitChoice:
    """The split to explain: ``split``, or else ``test`` of the data that the networks were trained on and all of any other data.

    The fingerprint in the models file decides whether these are the training data. Where the file has none (it was written by hand or by
    kdx 0.1.0), the data's path decides. In other data, copies of images that were used in training are recognised one by one.
    seed: the seed of the split where the models file does not state one.

    Raises KdxError for a split that does not exist, and for a damaged file of the images that were used.
    """
    relation = _relation(dataset, models)
    of_0_1_0 = models.fingerprint is None and _OLD_FINGERPRINT in models.training
    # Training splits the data with their own classes, whose order the models file may change.
    own = dataset if models.fingerprint is None or dataset.relabelled_from is None else dataset.relabelled_from
    parts = stratified_splits(own, seed if models.split_seed is None else models.split_seed, rule_of_0_1_0=of_0_1_0)
    everything = np.arange(len(dataset))
    name = split or ("test" if relation == "same" else "all")
    if name not in (*parts, "all"):
        raise KdxError(f"There is no split {name!r}.", f"Choose one of {', '.join(parts)}, all.")
    indices, pool = (everything, everything) if name == "all" else (parts[name], parts["train"])
    test_is_folder = validation_is_test(dataset) and not of_0_1_0
    used = None if relation == "same" else _recognised(dataset, models)
    if relation == "same":
        # Without the seed, only a test split that the data define is known.
        known = models.split_seed is not None or test_is_folder or "test" in dataset.splits
        used = ~np.isin(everything, parts["test"]) if known else None
    elif used is None and relation == "other":
        used = np.zeros(len(dataset), bool)
    origin = ""
    if relation == "same":
        origin = ", the data that the networks were trained on"
    elif relation == "other" and used is not None and not used.any():
        origin = ", other data than the networks were trained on"
    reason = f"{dataset.reference} may contain the networks' training data, although it has another fingerprint."
    return SplitChoice(
        name,
        indices,
        pool,
        used,
        test_is_folder and name != "all",
        f"Explaining the split {name}: {len(indices):,} images of {dataset.reference}{origin}.",
        reason if relation == "changed" else "",
        "Use --split test to explain images that the networks have not seen." if relation == "same" and used is not None else "",
    )


def with_recorded_data(models: ModelsFile) -> ModelsFile:
    """A models file that states no data, with the data and the split seed that the networks' checkpoints state if these agree.

    A checkpoint of `kdx distill` states them; a network with other weights is not considered.
    """
    if models.fingerprint is not None or models.data is not None:
        return models
    weights = [parse_reference(reference).weights for reference in models.references.values() if not is_file(reference)]
    paths = [split_key(models.path.parent / Path(name).expanduser())[0] for name in weights if name is not None]
    records = {record for record in map(read_training_data, paths) if record is not None}
    if len(records) != 1 or (record := records.pop()).of_0_1_0:
        return models
    return replace(models, fingerprint=record.fingerprint, split_seed=record.split_seed)


_ONE_DATA_SET = ("cifar10", "cifar100")
"""The sources of a single data set, whose versions contain the same images in other files."""

_OLD_FINGERPRINT = "data_fingerprint"
"""The key of [training] where `kdx distill` 0.1.0 recorded its fingerprint. Files made by other means do not have it."""


def _relation(dataset: Dataset, models: ModelsFile) -> _Relation:
    """How the data relate to those that the networks were trained on.

    same: they are these data. changed: they differ and may share images with these data. other: they are other data.
    unknown: the models file does not say enough.
    """
    if models.fingerprint is not None:
        if models.fingerprint == dataset.fingerprint:
            return "same"
        return "changed" if models.data is not None and _may_share_images(dataset.reference, models.data) else "other"
    if models.data is not None and located(models.data) == located(dataset.reference):
        return "same"
    recorded = models.training.get(_OLD_FINGERPRINT)
    return "same" if recorded == (dataset.relabelled_from or dataset).fingerprint_of_0_1_0 else "unknown"


def _recognised(dataset: Dataset, models: ModelsFile) -> NDArray[np.bool_] | None:
    """Whether each image is a copy of one that was used in training; None where the models file or the data have no keys of images."""
    path = None if models.used is None else models.path.parent / models.used
    if path is None or not path.is_file() or dataset.image_keys is None:
        return None
    try:
        return np.isin(dataset.image_keys, np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise KdxError(f"{path} cannot be read as a NumPy array.", "Remove it, or repeat the kdx distill command that wrote it.") from error


def _may_share_images(first: str, second: str) -> bool:
    """Whether two data references name the same published data set, the same folder, or folders of which one contains the other.

    Options of a reference, such as the split of a data set, do not matter, nor does which version of CIFAR a folder has.
    """
    sources = source_of(first), source_of(second)
    if sources[0] == sources[1] and sources[0] in _ONE_DATA_SET:
        return True
    one, other = _place(first), _place(second)
    return one == other or one in other.parents or other in one.parents


def _place(reference: str) -> Path:
    """The absolute path, or the name, in a data reference, without its source and options."""
    source = source_of(reference)
    place = located(reference).removeprefix(f"{source}:")
    return Path(place.partition(",")[0] if source == "hfdata" else place)
