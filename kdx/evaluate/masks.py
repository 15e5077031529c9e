"""Masks as the networks see their images: turned upright, and brought to the networks' size as the images are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.choices import Resizing
from kdx.data.dataset import Dataset
from kdx.data.pixels import fit, orientation_of, turned
from kdx.errors import KdxError
from kdx.evaluate.annotations import Annotations, Mask, read_annotations
from kdx.runs.record import RunRecord

_SAME_PROPORTIONS = 0.02
"""How much the proportions of a mask may differ from those of its image."""


@dataclass(frozen=True)
class MaskSource:
    """The masks of a run's images. places: of the images that have one, in samples.parquet. description: for the terminal."""

    description: str
    places: NDArray[np.int64]
    _mask: Callable[[int], Mask | None]
    _size: tuple[int, int]
    _resizing: Resizing

    def load(self, place: int) -> Mask | None:
        """The mask [H, W] of an image at the networks' size; None if no pixel of it is inside, for example because it is cropped away."""
        mask = self._mask(place)
        if mask is None:
            return None
        fitted = transformed(mask, self._size, self._resizing)
        return fitted if fitted.any() else None


def transformed(mask: Mask, size: tuple[int, int], resizing: Resizing) -> Mask:
    """A mask [h, w] brought to ``size`` as `kdx.data.pixels.fit` brings its image: a pixel is marked if at least half of it is.

    The bars of a letterbox are not marked.
    """
    levels = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(np.asarray(fit(levels, size, Resizing(resizing.mode, "bilinear"))) >= 128)


def upright(mask: Mask, stored: tuple[int, int], orientation: object, name: str) -> Mask:
    """A mask in the orientation of the upright image. stored: the (height, width) of the image as its file stores it.

    A mask with the proportions of the upright image is taken as it is, and a mask with those of the stored image is turned as the image
    is. Where both have the same proportions, it is taken as it is. Raises KdxError for a mask of other proportions.
    """
    turned_size = turned(Image.new("1", (stored[1], stored[0])), orientation)
    if _alike(mask.shape, (turned_size.height, turned_size.width)):
        return mask
    if _alike(mask.shape, stored):
        return np.asarray(turned(Image.fromarray(mask.astype(np.uint8)), orientation), dtype=bool)
    raise KdxError(
        f"The mask of {name} has {mask.shape[1]} x {mask.shape[0]} pixels, and the image {stored[1]} x {stored[0]}.",
        "Give masks with the proportions of the images.",
    )


def _alike(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two sizes have the same proportions, up to rounding to whole pixels."""
    ratio = first[0] * second[1] / (first[1] * second[0])
    return abs(ratio - 1) <= max(_SAME_PROPORTIONS, 1 / min(*first, *second))


def mask_source(run: RunRecord, resizing: Resizing, dataset: Dataset | None, path: Path | None) -> MaskSource | None:
    """The masks in ``path`` (`read_annotations`), else those of the data set itself; None if there are none.

    Without the data set, masks are taken to be upright. Raises KdxError if no image has a mask.
    """
    height, width = run.manifest["configuration"]["image_size"]
    size = int(height), int(width)
    index = {} if dataset is None else {name: number for number, name in enumerate(dataset.ids)}
    ids = run.samples.ids
    if path is not None:
        annotations = read_annotations(path)
        matches = annotations.match(ids)
        if not matches:
            raise KdxError(
                f"None of the run's {len(ids)} images has a mask in {path}.",
                f"Give each mask the name of its image, such as {ids[0]}, folders included.",
            )
        places = np.array([place for place, name in enumerate(ids) if name in matches], dtype=np.int64)
        of_image = _annotated(run, annotations, matches, dataset, index)
        return MaskSource(annotations.description, places, of_image, size, resizing)
    if dataset is None or dataset.masks is None:
        return None
    masks = dataset.masks

    def own(place: int) -> Mask | None:
        objects = masks(index[ids[place]])
        return None if objects is None or not len(objects) else np.asarray(objects.any(0))

    return MaskSource(f"masks of {dataset.reference}", np.arange(len(ids)), own, size, resizing)


def _annotated(
    run: RunRecord, annotations: Annotations, matches: dict[str, str], dataset: Dataset | None, index: dict[str, int]
) -> Callable[[int], Mask | None]:
    def mask(place: int) -> Mask | None:
        name = run.samples.ids[place]
        class_name = run.class_name(int(run.samples.labels[place]))
        if dataset is None:
            return annotations.masks[matches[name]](None, class_name)
        with dataset.reader(index[name]) as image:  # its header alone
            stored, orientation = (image.height, image.width), orientation_of(image)
        known = annotations.masks[matches[name]](stored, class_name)
        return None if known is None else upright(known, stored, orientation, name)

    return mask
