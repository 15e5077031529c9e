"""Metrics of where maps are high, against known masks of the objects."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdx.evaluate.candidates import Maps
from kdx.evaluate.metrics import Metric, Need, Task, Values

Masks = NDArray[np.bool_]

THRESHOLDS = np.arange(1, 101) / 100
"""The shares of a map's peak above which its positions are taken as the object, for the IoU."""


def pointing(maps: Maps, masks: Masks, tolerance: float = 0.0) -> Values:
    """The pointing game [n]: 1 if the highest position of a map lies in the mask or at most ``tolerance`` pixels away from it, else 0.

    maps, masks: [n, H, W]. If several positions are highest, the value is the share of them that hit, so that a uniform map has the
    share of the mask's area. Source: Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 126 (2018), where the
    tolerance is 15 pixels in photographs of about 500 x 375, and the shares of hits are averaged over the classes; here they are averaged
    over the images. It does not say that the rest of the map is on the object.
    """
    peaks = maps == maps.max((1, 2), keepdims=True)
    near = np.stack([_widened(mask, tolerance) for mask in masks]) if tolerance else masks
    return np.asarray((peaks & near).sum((1, 2)) / peaks.sum((1, 2)))


def _widened(mask: NDArray[np.bool_], tolerance: float) -> NDArray[np.bool_]:
    """The positions whose distance to the mask is at most ``tolerance`` pixels."""
    from scipy.ndimage import distance_transform_edt

    return np.asarray(distance_transform_edt(~mask) <= tolerance) if mask.any() else mask


def energy(maps: Maps, masks: Masks) -> Values:
    """The share of a map’s sum that lies in the mask [n], in [0, 1]: sum_p M(p) m(p) / sum_p M(p).

    maps [n, H, W] >= 0, with a positive sum. masks [n, H, W]. A uniform map has the share of the mask's area, so masks of other sizes have
    other values; `density` divides by it. Source: the energy-based pointing game of Wang et al., "Score-CAM: Score-Weighted Visual
    Explanations for Convolutional Neural Networks", CVPR workshops (2020). It does not say that the map covers the object.
    """
    values = maps.astype(np.float64)
    return np.asarray((values * masks).sum((1, 2)) / values.sum((1, 2)))


def density(maps: Maps, masks: Masks) -> Values:
    """`energy` divided by the share of the area that the mask has [n]: 1 for a uniform map, at most 1 / share.

    It is the mean of the map inside the mask, divided by its mean over the image. Images with small masks can have much higher values
    than others, and dominate a mean over images.
    """
    return np.asarray(energy(maps, masks) / masks.mean((1, 2)))


def iou_curves(maps: Maps, masks: Masks) -> Values:
    """The intersection over union [n, 100] of the mask and the positions where a map is at least a share t of its peak, per threshold.

    maps [n, H, W] in [0, 1], with the peak 1. masks [n, H, W].
    """
    return np.stack([_iou_curve(map_, mask) for map_, mask in zip(maps, masks, strict=True)])


def _iou_curve(map_: NDArray[np.float32], mask: NDArray[np.bool_]) -> Values:
    passed = np.searchsorted(THRESHOLDS, map_.astype(np.float64).ravel(), side="right")  # how many thresholds each position reaches
    inside = mask.ravel()
    size = len(THRESHOLDS) + 1
    # Position p is in the region of threshold k if passed[p] > k.
    region = np.bincount(passed, minlength=size)[::-1].cumsum()[::-1][1:]
    common = np.bincount(passed[inside], minlength=size)[::-1].cumsum()[::-1][1:]
    return np.asarray(common / (region + inside.sum() - common), dtype=np.float64)


# ---------------------------------------------------------------- as metrics


def _masks(task: Task, part: slice) -> Masks:
    masks = task.subject.masks
    if masks is None:
        raise ValueError("there are no masks")
    return masks[part]


def _pointing(task: Task) -> dict[str, Values]:
    tolerance = task.options.tolerance
    return {"": task.per_image(lambda part: pointing(task.at_image_size(part), _masks(task, part), tolerance))}


def _energy(task: Task) -> dict[str, Values]:
    return {"": task.per_image(lambda part: energy(task.at_image_size(part), _masks(task, part)))}


def _density(task: Task) -> dict[str, Values]:
    return {"": task.per_image(lambda part: density(task.at_image_size(part), _masks(task, part)))}


def _iou(task: Task) -> dict[str, Values]:
    curves = task.per_image(lambda part: iou_curves(task.at_image_size(part), _masks(task, part)))
    return {"": curves[:, int(curves.mean(0).argmax())], "per image": curves.max(1)}


_NEEDS: frozenset[Need] = frozenset({"masks"})

LOCALISATION: tuple[Metric, ...] = (
    Metric(
        "energy",
        "energy inside the mask",
        "The share of the map’s sum that lies inside the mask. A uniform map has the mask’s share of the area.",
        "higher",
        _energy,
        _NEEDS,
    ),
    Metric(
        "density",
        "density inside the mask",
        "The map’s mean inside the mask, divided by its mean over the image: 1 for a uniform map.",
        "higher",
        _density,
        _NEEDS,
        chance=1.0,
    ),
    Metric(
        "pointing",
        "pointing game",
        "The share of the images in which the highest position of the map lies inside the mask.",
        "higher",
        _pointing,
        _NEEDS,
        options=("tolerance",),
        hits=True,
    ),
    Metric(
        "iou",
        "IoU at the best threshold",
        "The intersection over union of the mask and the positions above a share of the map’s peak: the share with the highest mean over "
        "these images, or the best one per image, which is optimistic.",
        "higher",
        _iou,
        _NEEDS,
    ),
)
