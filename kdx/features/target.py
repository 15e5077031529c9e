"""The target that relevance is measured against: labels or an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array, check_same, checked_centred, tensor
from kdx.features.rows import feature_distances, rows_of
from kdx.kernels import geometry, tiles
from kdx.roles import TARGET


@dataclass(frozen=True)
class Target:
    """The target of a batch: its rows [n, e], their distances and U-centred matrix [n, n]."""

    rows: Tensor
    distances: Tensor
    centred: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Target:
        arrays.check_images(len(labels))
        rows = target_embedding(labels, len(labels))
        d = geometry.distances(rows)
        return cls(rows, d, checked_centred(d[None], {"target": rows})[0])


_CLASSES = 1024
"""Up to so many distinct rows of an embedding, their distances are a table; `_LOOKED_AT` rows tell whether that is worth trying."""

_LOOKED_AT = 4096


def target_array(target: Any) -> Array:
    """A target in memory; one in a Zarr array is small enough to read."""
    return arrays.tensor(np.asarray(target[...]) if hasattr(target, "oindex") else target, TARGET)


def target_matrix(target: Array, n: int, device: torch.device) -> tiles.Matrix:
    """Labels, and an embedding of few distinct rows, as classes; any other embedding as rows."""
    known = arrays.tensor(target, TARGET).to(device)
    arrays.check_same(known.shape[0] if known.ndim else 0, n, "the target", "features")
    if known.ndim == 1 and not known.is_floating_point():
        _, codes = known.unique(return_inverse=True)
        return tiles.ClassDistances(codes)
    rows = target_embedding(known, n)
    arrays.check_finite(rows, TARGET)
    if len(rows[:_LOOKED_AT].unique(dim=0)) <= _CLASSES:
        distinct, codes = rows.unique(dim=0, return_inverse=True)
        if len(distinct) <= _CLASSES:
            return tiles.ClassDistances(codes, geometry.distances(distinct))
    return feature_distances(rows_of(rows, TARGET), TARGET)


def target_embedding(array: Array, n: int) -> Tensor:
    """Integer labels [n] or an embedding [n, e] as an embedding, labels as one-hot rows."""
    target = tensor(array, "target")
    check_same(target.shape[0] if target.ndim else 0, n, "the target", "features")
    if target.ndim == 2 and target.shape[1]:
        return target if target.is_floating_point() else target.double()
    if target.ndim != 1 or target.is_floating_point():
        raise KdxError(
            f"The target has shape {list(target.shape)} and type {target.dtype}.",
            "Give integer labels [n] or an embedding [n, e]; a number an image is an embedding [n, 1].",
        )
    classes: Tensor = target.unique()
    return (target[:, None] == classes[None, :]).double()
