"""What is evaluated: some images of a run with their masks, pixels, networks and maps, each loaded when it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.dataset import Dataset
from kdx.data.images import load_images
from kdx.data.splits import class_balanced_sample
from kdx.errors import KdxError
from kdx.evaluate.class_maps import ClassMapPair, class_maps
from kdx.evaluate.masks import MaskSource, mask_source
from kdx.evaluate.networks import layer_names, load_networks, load_untrained
from kdx.models.layer_pairs import LayerNames
from kdx.models.network import Network
from kdx.runs.record import RunRecord
from kdx.runs.run_data import is_data_of, recorded_resizing, reopened
from kdx.runtimes.choice import choose

PART = 32
"""Images whose maps are at the size of the image at once."""


@dataclass(frozen=True)
class Sources:
    """Where the parts of an evaluation come from, by default where the run had them.

    data: the reference of the run's data. models: its models file. masks: see `kdx.evaluate.annotations.read_annotations`. device: of the
    networks.
    """

    data: str | None = None
    models: Path | None = None
    masks: Path | None = None
    device: str = "auto"


class MapSource(Protocol):
    """Images with the maps of all candidates: the images of a run with its maps, or maps that are computed anew.

    size: the (H, W) of the images. stored_maps: maps [n, h, w] of a kind that runs have. class_maps: Grad-CAM and HiResCAM [n, h, w].
    """

    size: tuple[int, int]

    def __len__(self) -> int: ...

    def stored_maps(self, layer: str, kind: str) -> NDArray[np.float32]: ...

    def class_maps(self, role: str, layer: str) -> ClassMapPair: ...


class Subject:
    """n images of a run, and everything that metrics need of them.

    run: the run. places [n]: of the images, in samples.parquet. masks [n, H, W]: where their objects are; None without masks. size: the
    (H, W) of the images as the networks receive them. shared: results for all candidates at once, by the name of what computes them.
    Properties raise KdxError where the run's data or networks are not available.
    """

    def __init__(self, run: RunRecord, images: int | None, seed: int, sources: Sources, announce: Callable[[str], None] = print) -> None:
        height, width = run.manifest["configuration"]["image_size"]
        self.run, self.sources, self.seed = run, sources, seed
        self.size = int(height), int(width)
        self._announce = announce
        self.shared: dict[str, Any] = {}
        self._class_maps: dict[str, dict[str, ClassMapPair]] = {}
        source = mask_source(run, recorded_resizing(run), self._dataset_or_none, sources.masks)
        self.masks: NDArray[np.bool_] | None = None
        if source is None:
            self.places = self._sample(np.arange(len(run.samples.ids)), images)
        else:
            self.places, self.masks = self._with_masks(source, images)

    def _with_masks(self, source: MaskSource, images: int | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A sample of the images that have a mask, and the masks. Announces how many have none."""
        masks = {int(place): source.load(int(place)) for place in self._sample(source.places, images)}
        places = np.array([place for place, mask in masks.items() if mask is not None], dtype=np.int64)
        ids = self.run.samples.ids
        without = [ids[place] for place in np.setdiff1d(np.arange(len(ids)), source.places)]
        outside = [ids[place] for place, mask in masks.items() if mask is None]
        for names, reason in ((without, "without a mask"), (outside, "without a marked object inside the image that the networks see")):
            if names:
                self._announce(f"{len(names):,} of {len(ids):,} images {reason} are left out, such as {', '.join(names[:3])}.")
        if not len(places):
            raise KdxError(f"The {source.description} mark no object in these images.", "Give masks that belong to this data.")
        self._announce(f"Masks: {source.description}, for {len(places):,} images.")
        return places, np.stack([mask for mask in masks.values() if mask is not None])

    def _sample(self, places: NDArray[np.int64], images: int | None) -> NDArray[np.int64]:
        """Up to ``images`` of these images, balanced over the classes, in their order; all for None."""
        if images is None or images >= len(places):
            return places
        return np.sort(places[class_balanced_sample(self.run.samples.labels[places], images, self.seed)])

    def __len__(self) -> int:
        return len(self.places)

    @property
    def ids(self) -> list[str]:
        """The names [n] of the images."""
        return [self.run.samples.ids[place] for place in self.places]

    @property
    def rows(self) -> list[int]:
        """The rows [n] of the images in maps.zarr."""
        return [int(row) for row in self.run.samples.rows[self.places]]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The classes [n] of the images."""
        return np.asarray(self.run.samples.labels[self.places], dtype=np.int64)

    @property
    def parts(self) -> Iterator[slice]:
        """The images in parts of at most `PART`."""
        return (slice(start, min(start + PART, len(self))) for start in range(0, len(self), PART))

    # ---- data

    @cached_property
    def dataset(self) -> Dataset:
        """The run's data. Raises KdxError if it is not there, or not the run's."""
        reference = self.sources.data or self.run.data
        try:
            dataset = reopened(self.run, reference)
        except KdxError as error:
            raise KdxError(f"The run's data cannot be opened: {error.problem}", "Give its place with --data.") from error
        if not is_data_of(self.run, dataset):
            raise KdxError(f"{reference} is not the run's data.", "Give the run's data with --data.")
        return dataset

    @property
    def _dataset_or_none(self) -> Dataset | None:
        try:
            return self.dataset
        except KdxError:
            if self.sources.data is not None:  # the user named it
                raise
            return None

    def pixels(self, part: slice | NDArray[np.int64]) -> Tensor:
        """The images [k, 3, H, W] of this part, float32 in [0, 1], as the networks receive them. Raises KdxError for an unreadable one."""
        index = self._index[part]
        images = load_images(self.dataset, index, self.size)
        if images.unreadable:
            name, reason = images.unreadable[0]
            raise KdxError(f"The image {name} can no longer be read: {reason}.", "Repair it, or give the run's data with --data.")
        return images.pixels

    @cached_property
    def _index(self) -> NDArray[np.int64]:
        """The images [n] as rows of the data set."""
        rows = {name: row for row, name in enumerate(self.dataset.ids)}
        return np.array([rows[name] for name in self.ids], dtype=np.int64)

    # ---- networks

    @cached_property
    def networks(self) -> dict[str, Network]:
        """The run's networks by role. Raises KdxError if they are not there, or not the run's."""
        return load_networks(self.run, self.sources.models)

    def untrained(self, role: str) -> Network:
        """The role's architecture with random weights. Raises KdxError if kdx does not know how it is initialised."""
        return load_untrained(self.run, self.sources.models, role, self.seed)

    @cached_property
    def layer_names(self) -> dict[str, LayerNames]:
        """The name that each role's network has for the layers of the run, by the student's."""
        return layer_names(self.run)

    @cached_property
    def device(self) -> torch.device:
        return choose("eager", self.sources.device).device

    # ---- maps

    def stored_maps(self, layer: str, kind: str) -> NDArray[np.float32]:
        """The run's maps [n, h, w] of this kind at the student's layer."""
        return self.run.maps(layer, kind, self.rows)

    def class_maps(self, role: str, layer: str) -> ClassMapPair:
        """Grad-CAM and HiResCAM [n, h, w] of a role's network for each image's label, at the role's layer.

        All layers are computed at once, and kept.
        """
        if role not in self._class_maps:
            names = [by_role.at(role) for by_role in self.layer_names.values()]
            labels = torch.from_numpy(self.labels)
            parts = ((self.pixels(part), labels[part]) for part in self.parts)
            self._class_maps[role] = class_maps(self.networks[role], names, parts, len(self.run.classes), self.device)
        return self._class_maps[role][self.layer_names[layer].at(role)]
