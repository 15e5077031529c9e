"""The target that relevance is measured against: class labels or an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError, near_names
from kdx.features import arrays
from kdx.features.rows import feature_distances, rows_of
from kdx.kernels import geometry, tiles
from kdx.kernels.dispatch import BatchDistances, ReferenceDistances, TorchBackend
from kdx.roles import TARGET

_MAX_CLASSES = 1024
"""An embedding with at most this many distinct rows is treated as classes, whose distances from each other form a table."""

_SAMPLED_ROWS = 4096
"""Only if this many rows have few distinct ones, the distinct rows of the whole embedding are searched for."""


@dataclass
class ClassNames:
    """The numbers of classes that are given by name.

    names: in the order of their numbers. known: whether these are all classes; otherwise a new name gets the next number.
    """

    names: list[str] = field(default_factory=list)
    known: bool = False

    def target(self, values: Any) -> Any:
        """Labels or an embedding as an array: a list becomes an array, and names become numbers. Other values are returned unchanged.

        Raises KdxError for a name that is not one of the known classes.
        """
        if isinstance(values, Sequence) or (hasattr(values, "__array__") and not isinstance(values, np.ndarray | Tensor)):
            values = np.asarray(values)
        if not isinstance(values, np.ndarray) or values.ndim != 1 or not _are_names(values):
            return values
        numbers = {name: number for number, name in enumerate(self.names)}
        for name in dict.fromkeys(map(str, values)):
            if name not in numbers and self.known:
                near = near_names(name, self.names, self.names)
                hint = f"Existing names: {near}." if near else "Give integer labels, as for the reference images."
                raise KdxError(f"There is no class {name!r}.", hint)
            if name not in numbers:
                numbers[name] = len(self.names)
                self.names.append(name)
        return np.array([numbers[str(name)] for name in values], dtype=np.int64)


def _are_names(values: np.ndarray[Any, Any]) -> bool:
    return values.dtype.kind in "UT" or (values.dtype.kind == "O" and len(values) > 0 and all(isinstance(name, str) for name in values))


@dataclass(frozen=True, eq=False)
class Classes:
    """The distinct rows of a target, in lexicographic order.

    codes [n]: the index of each image's row among them. count: the number of distinct rows. rows [count, e]: the rows themselves; None
    for labels, whose one-hot rows are all at the distance sqrt(2) from each other.
    """

    codes: Tensor
    count: int
    rows: Tensor | None


@dataclass(frozen=True, eq=False)
class Target:
    """The target of n images. Its geometry is computed once, when it is first used.

    values: integer labels [n] or an embedding [n, e]. backend: computes the distances. names: the classes by name, if labels were names.
    """

    values: Tensor
    backend: TorchBackend
    names: ClassNames = field(default_factory=lambda: ClassNames(known=True))

    @classmethod
    def of(cls, target: Any, n: int | None = None, *, device: torch.device | None = None, backend: TorchBackend = TorchBackend()) -> Target:
        """The target of n images from labels [n] (integers or class names) or an embedding [n, e]: NumPy, PyTorch, Zarr, or lists.

        n: the expected number of rows. device: where the target is moved to. Raises KdxError for another number of rows, for fewer than
        four, and for any other shape or type; TypeError for anything but an array or a list.
        """
        names = ClassNames()
        target = np.asarray(target[...]) if hasattr(target, "oindex") else names.target(target)
        names.known = not names.names
        values = arrays.tensor(target, TARGET).to(device)
        rows = values.shape[0] if values.ndim else 0
        n = rows if n is None else n
        arrays.check_same(rows, n, "labels or class embeddings", "features")
        embedding = values.ndim == 2 and values.shape[1] > 0
        if not embedding and (values.ndim != 1 or values.is_floating_point()):
            raise KdxError(
                f"The target has shape {list(values.shape)} and type {values.dtype}.",
                "Give integer labels [n] or an embedding [n, e]; one number per image is an embedding [n, 1].",
            )
        arrays.check_images(n)
        return cls(values, backend, names)

    @cached_property
    def rows(self) -> Tensor:
        """The embedding [n, e], floating-point; labels become one-hot rows."""
        if self.values.ndim == 2:
            return self.values if self.values.is_floating_point() else self.values.double()
        classes: Tensor = self.values.unique()
        return (self.values[:, None] == classes).double()

    @cached_property
    def distances(self) -> BatchDistances:
        """Distances between the rows [n, n]. Raises KdxError if they are not finite, or all equal (one class, or one image per class)."""
        if self.values.ndim == 1:
            raw, rows = geometry.label_distances(self.values, self.values), self.values[:, None].double()
        else:
            raw, rows = self.backend.distances(self.rows), self.rows
        return arrays.checked_distances(raw[None], {TARGET: rows})[0]

    def checked(self) -> Target:
        """The same target, after its geometry was computed, which raises KdxError if it has none."""
        _ = self.distances
        return self

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values and their geometry; for labels, the classes as well."""
        geometry_ = self.values, self.distances.raw, self.distances.centred
        return (*geometry_, self.classes.codes) if self.values.ndim == 1 and self.classes is not None else geometry_

    def with_tensors(self, tensors: Sequence[Tensor]) -> Target:
        """The same target with these copies of its ``tensors`` on another device. Its geometry is not computed again."""
        values, raw, centred, *codes = tensors
        moved = Target(values, self.backend, self.names)
        moved.__dict__["distances"] = BatchDistances(raw, centred)
        if codes and self.classes is not None:
            moved.__dict__["classes"] = Classes(codes[0], self.classes.count, None)  # the classes of labels have no rows
        return moved

    @cached_property
    def classes(self) -> Classes | None:
        """The distinct rows; None for an embedding with too many of them."""
        if self.values.ndim == 1:
            labels, codes = self.values.unique(return_inverse=True)
            return Classes(len(labels) - 1 - codes, len(labels), None)  # the largest label has the first row in order
        if len(self.rows[:_SAMPLED_ROWS].unique(dim=0)) > _MAX_CLASSES:
            return None
        distinct, codes = self.rows.unique(dim=0, return_inverse=True)
        return Classes(codes, len(distinct), distinct) if len(distinct) <= _MAX_CLASSES else None

    def matrix(self) -> tiles.Matrix:
        """The target as a distance matrix whose tiles are computed on demand. Raises KdxError for rows that are not finite."""
        if self.values.ndim == 2:
            arrays.check_finite(self.rows, TARGET)
        if self.classes is None:
            return feature_distances(rows_of(self.rows, TARGET), TARGET)
        distinct = self.classes.rows
        return tiles.ClassDistances(self.classes.codes, None if distinct is None else geometry.distances(distinct))

    def reference_distances(self, queries: Tensor) -> ReferenceDistances:
        """The distances of reference mode, where this is the target of the reference set: within it, and from each query's target to it.

        queries: labels [q] if this target is labels, else an embedding [q, e] of the same width. Raises KdxError for anything else, and
        for distances that are not finite.
        """
        if queries.ndim == 0 or queries.shape[1:] != self.values.shape[1:]:
            raise KdxError(
                f"The target has shape {list(queries.shape)}, and that of the reference set has {list(self.values.shape)}.",
                "Give both as labels, or both as the same embedding.",
            )
        m = len(self.values)
        rows = Target.of(torch.cat([self.values.to(queries.device), queries])).rows.to(self.values.device)
        border = geometry.cross_distances(rows[m:], rows[:m])
        arrays.check_distances(border, rows[m:], TARGET)
        return ReferenceDistances(self.distances.raw, border)
