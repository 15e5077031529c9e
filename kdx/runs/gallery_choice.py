"""Which images a run's page shows: balanced over the classes, those with the highest values of a number, or images by name."""

from __future__ import annotations

import difflib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.data.images import load_images
from kdx.data.splits import class_balanced_sample
from kdx.disk import parse_json, write_atomic
from kdx.errors import KdxError
from kdx.roles import maps_among, score_maps_among
from kdx.runs import schema
from kdx.runs.image_numbers import MEANINGS, image_number, number_names, prediction_names
from kdx.runs.measured import Samples
from kdx.runs.record import RunRecord
from kdx.runs.run_data import is_data_of, reopened

BALANCED = "balanced"
"""The order that is no order: images balanced over the classes."""


@dataclass(frozen=True)
class GalleryChoice:
    """The images of a gallery.

    count: how many. order: `BALANCED`, of which up to a third are images that at least one network misclassifies; or a number of an image
    (`kdx.runs.image_numbers.number_names`), for the images with its highest values, the highest first. images: names of images; they
    replace the count. A part of a name after a slash is sufficient where only one image has it.
    """

    count: int = 60
    order: str = BALANCED
    images: tuple[str, ...] = ()

    def check(self, ids: Sequence[str], roles: Collection[str], layers: Collection[str], *, score_maps: bool) -> None:
        """KdxError for a name or an order that a run of these images, roles and layers, with or without score maps, cannot have."""
        _named(self.images, ids)
        kinds = (*maps_among(roles), *(score_maps_among(roles) if score_maps else ()))
        maps = (schema.map_column(layer, kind, name) for layer in layers for kind in kinds for name in schema.MAP_COLUMNS)
        check_order(self.order, (*prediction_names(roles), *map(schema.confidence_column, roles), *maps))

    def places(self, samples: Samples, number: Callable[[str], NDArray[np.float64]], seed: int) -> NDArray[np.int64]:
        """The chosen images, as places in samples.parquet, in the order of the page."""
        if self.images:
            chosen = _named(self.images, samples.ids, required=False)
        elif self.order == BALANCED:
            return _balanced(samples, self.count, seed)
        else:
            chosen = np.arange(len(samples.ids))
        if self.order != BALANCED:
            values = number(self.order)[chosen]
            chosen = chosen[np.argsort(np.nan_to_num(-values, nan=np.inf), kind="stable")]
        return chosen if self.images else chosen[: self.count]

    def description(self, shown: int) -> str:
        """How the images of a page were chosen, as a sentence."""
        images = "image" if shown == 1 else f"{shown:,} images"
        by = MEANINGS.get(self.order, f"the number {self.order}")
        if self.images:
            return f"Images were chosen by name{'' if self.order == BALANCED else f' and sorted by {self.order}: {by}'}."
        if self.order == BALANCED:
            return "Images were chosen balanced over the classes; up to a third are images that at least one network misclassifies."
        return f"These are the {images} with the highest value of {self.order}: {by}. They do not represent the set."


def _balanced(samples: Samples, count: int, seed: int) -> NDArray[np.int64]:
    wrong = np.flatnonzero(np.any([~samples.correct(role) for role in samples.predictions], axis=0))
    picked: NDArray[np.int64] = np.empty(0, np.int64)
    if len(wrong) and count:
        picked = wrong[class_balanced_sample(samples.labels[wrong], max(1, count // 3), seed)]
    rest = np.setdiff1d(np.arange(len(samples.labels)), picked)
    more = min(count - len(picked), len(rest))
    if more > 0:
        picked = np.concatenate([picked, rest[class_balanced_sample(samples.labels[rest], more, seed)]])
    return np.sort(picked)


def _named(names: Sequence[str], ids: Sequence[str], *, required: bool = True) -> NDArray[np.int64]:
    """The places of images by name. Raises KdxError for a name that no image has, if it is required, and for one that several have."""
    if not names:
        return np.empty(0, np.int64)
    exact = {name: place for place, name in enumerate(ids)}
    ends: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(ids):
        parts = name.split("/")
        for start in range(1, len(parts)):
            ends["/".join(parts[start:])].append(place)
    places = []
    for name in names:
        matches = [exact[name]] if name in exact else ends.get(name, [])
        if len(matches) > 1:
            raise KdxError(f"{len(matches)} images are named {name}.", f"Give the class too: {', '.join(ids[i] for i in matches[:3])}.")
        if required and not matches:
            near = difflib.get_close_matches(name, ids, n=3, cutoff=0.4) or ids[:3]
            raise KdxError(f"There is no image {name!r}.", f"Give names of images, such as {', '.join(near)}.")
        places += matches
    return np.array(list(dict.fromkeys(places)), dtype=np.int64)


def check_order(order: str, names: Sequence[str]) -> None:
    """KdxError for an order that is neither `BALANCED` nor among these numbers."""
    if order != BALANCED and order not in names:
        near = difflib.get_close_matches(order, names, n=3, cutoff=0.5) or names[:3]
        raise KdxError(f"Images have no number {order!r} to be ordered by.", f"Give {BALANCED}, or a number such as {', '.join(near)}.")


# ---------------------------------------------------------------- the files of a run


def write_choice(folder: Path, choice: GalleryChoice, rows: Sequence[int]) -> None:
    """Write the choice and the rows of the images in the order of the page."""
    content = {**asdict(choice), "rows": [int(row) for row in rows]}
    write_atomic(folder / schema.GALLERY, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def read_choice(run: RunRecord) -> tuple[GalleryChoice, list[int]]:
    """The choice of a run, and the rows of its images that have pictures.

    A run of kdx 0.1.0 stored no choice: its images are balanced, in the order of the data.
    """
    pictured = schema.pictured_rows(run.folder)
    path = run.folder / schema.GALLERY
    if not path.exists():
        return GalleryChoice(len(pictured)), pictured
    try:
        content: Mapping[str, Any] = parse_json(path.read_text("utf-8"))
        choice = GalleryChoice(int(content["count"]), str(content["order"]), tuple(map(str, content["images"])))
        rows = [int(row) for row in content["rows"]]
    except (ValueError, KeyError, TypeError):  # a damaged choice is no reason to lose a page
        return GalleryChoice(len(pictured)), pictured
    return choice, [row for row in rows if row in set(pictured)]


def choose_again(run: RunRecord, choice: GalleryChoice, data: str | None = None) -> None:
    """Choose other images for the page of a finished run, and write the pictures that the run does not have.

    data: where the images are now; by default where they were. Raises KdxError for a name or an order that the run does not have, and if
    pictures are needed and the data is not the run's.
    """
    _named(choice.images, run.samples.ids)
    check_order(choice.order, number_names(run))
    places = choice.places(run.samples, lambda name: image_number(run, name), int(run.manifest["configuration"]["seed"]))
    rows = run.samples.rows[places]
    pictured = set(schema.pictured_rows(run.folder))
    missing = [place for place, row in zip(places, rows, strict=True) if int(row) not in pictured]
    if missing:
        _write_pictures(run, missing, data)
    write_choice(run.folder, choice, [int(row) for row in rows])


def _write_pictures(run: RunRecord, places: Sequence[int], data: str | None) -> None:
    """Write the pictures of images from the data of a run."""
    configuration = run.manifest["configuration"]
    reference = data or configuration["data"]
    without = f"{len(places)} of these images"
    hint = "Give the data with --data, or choose among the images that the page shows."
    try:
        dataset = reopened(run, reference)
    except KdxError as error:
        raise KdxError(
            f"{len(places)} of these images have no picture in the run, and its data cannot be opened: {error.problem}", hint
        ) from error
    if not is_data_of(run, dataset):
        raise KdxError(f"{without} have no picture in the run, and {reference} is not its data.", hint)
    index = {name: place for place, name in enumerate(dataset.ids)}
    height, width = configuration["image_size"]
    images = load_images(dataset, [index[run.samples.ids[place]] for place in places], (height, width))
    by_index = dict(zip((int(i) for i in images.kept), images.pixels, strict=True))
    for place in places:
        pixels = by_index.get(index[run.samples.ids[place]])
        if pixels is not None:
            write_picture(run.folder, int(run.samples.rows[place]), pixels.mul(255).round().byte().permute(1, 2, 0).numpy())


def write_picture(folder: Path, row: int, pixels: NDArray[np.uint8]) -> None:
    """Write an image [H, W, 3] of the gallery at the size that the networks receive."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    path = schema.picture_path(folder, row)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, content.getvalue())
