"""Features as rows [n, d], read on demand from memory, from a file that NumPy maps into memory, or from a Zarr array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.kernels import tiles
from kdx.kernels.distances import ordinary, power_of_two, wide
from kdx.kernels.tiles import Rows

if TYPE_CHECKING:
    import zarr

    Source = arrays.Array | zarr.Array[Any]
else:
    Source = Any
"""Features [n, d] or [n, C, H, W]: a NumPy array, memory-mapped or not, a PyTorch tensor, or a Zarr array."""


def rows_of(source: Source, name: str) -> Rows:
    """``source`` as rows, one per image. No data is read yet.

    Raises KdxError for another shape, a size of zero, a type that is not floating-point, and an iterable that is not an array; TypeError
    for anything else.
    """
    if isinstance(source, Tensor):
        return InMemory(arrays.feature_map(source, name).flatten(1))
    if isinstance(source, np.ndarray) and not isinstance(source, np.memmap):
        return InMemory(arrays.feature_map(source, name).flatten(1))
    if isinstance(source, np.memmap) or hasattr(source, "oindex"):
        dtype = np.dtype(source.dtype)
        arrays.check_features(source.shape, str(dtype), dtype.kind == "f" and dtype.itemsize <= 8, name)
        return _OnDisk(source)
    if isinstance(source, Iterable) and not isinstance(source, str | bytes):
        once = ", and it can be read only once" if isinstance(source, Iterator) else ""
        raise KdxError(
            f"The {name} are a {type(source).__name__}, not an array{once}.",
            "Give an array; for more data than fits in memory, give a file: numpy.memmap or a Zarr array.",
        )
    raise TypeError(f"{name} must be a NumPy or Zarr array or a PyTorch tensor, not {type(source).__name__}")


@dataclass(frozen=True)
class InMemory:
    """Rows of a tensor [n, d]."""

    tensor: Tensor
    run = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def read(self, index: Tensor) -> Tensor:
        return self.tensor.index_select(0, index)


@dataclass(frozen=True)
class _OnDisk:
    source: Any
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape[0], prod(self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return torch.from_numpy(np.empty(0, np.dtype(self.source.dtype).newbyteorder("="))).dtype

    @property
    def run(self) -> int:
        """Zarr decompresses whole chunks, so the rows of a chunk are best read together. A memory-mapped file reads single rows as fast."""
        return 1 if isinstance(self.source, np.memmap) else int((self.source.shards or self.source.chunks)[0])

    def read(self, index: Tensor) -> Tensor:
        images = index.numpy()
        if len(images) and (np.diff(images) == 1).all():
            block = self._sorted(images).reshape(len(images), -1)
            native = block.astype(block.dtype.newbyteorder("="), copy=False)
            return torch.from_numpy(native if native.flags.writeable else native.copy())  # PyTorch has no read-only tensors
        order = np.argsort(images)
        rows = self._sorted(images[order])
        result = np.empty((len(images), self.shape[1]), rows.dtype.newbyteorder("="))
        result[order] = rows.reshape(result.shape)
        return torch.from_numpy(result)

    def _sorted(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of a sorted index."""
        first, last = int(index[0]), int(index[-1])
        if last - first == len(index) - 1:
            return np.asarray(self.source[first : last + 1])
        return np.asarray(self.source[index] if isinstance(self.source, np.memmap) else self.source.oindex[index])


@dataclass(frozen=True)
class Selected:
    """The rows ``index`` [n] of other rows, moved to a device when they are read."""

    source: Rows
    index: Tensor
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.index), self.source.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def run(self) -> int:
        return self.source.run

    def read(self, index: Tensor) -> Tensor:
        return self.source.read(self.index[index.to(self.index.device)]).to(self.device)


def resident(rows: Rows, device: torch.device, free: int) -> Rows:
    """The same rows in the memory of ``device`` if they take at most a quarter of its ``free`` bytes, else ``rows``.

    A sweep over all pairs of images reads each row once per tile of other images. Without this copy, each read would copy it to the device.
    """
    n, d = rows.shape
    if n * d * rows.dtype.itemsize > free // 4:
        return rows
    tensor = torch.empty(n, d, dtype=rows.dtype, device=device)
    for part in torch.arange(n).split(tiles.TILE):
        tensor[int(part[0]) : int(part[-1]) + 1] = rows.read(part)
    return Selected(InMemory(tensor), torch.arange(n, device=device), device)


@dataclass(frozen=True)
class _Multiplied:
    """Other rows times a power of two."""

    source: Rows
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def run(self) -> int:
        return self.source.run

    def read(self, index: Tensor) -> Tensor:
        return self.source.read(index) * self.factor


@dataclass(frozen=True)
class UnitRows:
    """Other rows, each divided by its Euclidean norm, in float32 or float64. A row of zeros stays as it is."""

    source: Rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.source.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return torch.device(self.source.device)

    @property
    def run(self) -> int:
        return self.source.run

    def read(self, index: Tensor) -> Tensor:
        rows = wide(self.source.read(index))
        largest = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True)
        rows = rows / torch.where(largest > 0, largest, 1.0)  # the squares of very small or large rows would under- or overflow
        norms = torch.linalg.vector_norm(rows, 2, 1, keepdim=True)
        return rows / torch.where(norms > 0, norms, 1.0)


def _largest(rows: Rows) -> float:
    """The largest absolute value; NaN or infinity if there is one."""
    everyone = torch.arange(rows.shape[0], device=rows.device)
    parts = [torch.linalg.vector_norm(rows.read(part), torch.inf) for part in everyone.split(tiles.TILE)]
    return float(torch.stack(parts).amax())


def unit_of(rows: Rows) -> float:
    """The power of two that features were multiplied by to get the rows of `feature_distances`."""
    return rows.factor if isinstance(rows, _Multiplied) else 1.0


def feature_distances(rows: Rows, name: str) -> tiles.FeatureDistances:
    """``rows`` as a distance matrix whose tiles are computed on demand. Raises KdxError for rows that are not finite or too large.

    Very small or large rows are multiplied by a power of two, so that their squares keep all digits. That changes no score, but whatever
    has the unit of a distance; see `unit_of`.
    """
    matrix = tiles.FeatureDistances.of(rows)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if not ordinary(matrix.norms.sqrt(), dtype):
        factor = power_of_two(_largest(rows), dtype)
        if factor != 1:
            matrix = tiles.FeatureDistances.of(_Multiplied(rows, factor))
    bad = ~matrix.norms.isfinite()
    if bool(bad.any()):
        for row in torch.nonzero(bad).flatten():  # a norm may overflow although its row is finite
            bad[row] = not bool(rows.read(row[None]).isfinite().all())
        raise arrays.not_finite(bad, name) if bool(bad.any()) else arrays.too_large(name)
    return matrix
