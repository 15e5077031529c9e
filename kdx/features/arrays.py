"""Converts and checks arrays: NumPy or PyTorch in, the same kind out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.errors import KdxError
from kdx.kernels import geometry
from kdx.kernels.dispatch import BatchDistances, TorchBackend
from kdx.roles import TARGET

Array = NDArray[Any] | Tensor

Labels = Array | Sequence[Any]
"""Labels [n], integers or class names, or an embedding [n, e]: an array or a list (`kdx.features.target`)."""

ArrayT = TypeVar("ArrayT", NDArray[Any], Tensor, NDArray[Any] | Tensor)
"""The kind of an array: NumPy in, NumPy out; Tensor in, Tensor out. An argument that may be either gives a result that may be either."""

_Order = TypeVar("_Order", NDArray[np.int64], Tensor)

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LARGEST = 1e50
"""The largest distance whose sixth power, which the moments of inner products contain, is a number in float64."""

_CENTRING_ROUNDING = 2.0**-48
"""The largest rounding of U-centring, relative to the largest distance. Up to 1.1e-15 was measured, for up to 1,132 images."""

MIN_IMAGES = 4
"""The fewest images that have U-centred geometry: the unbiased inner product divides by n(n - 3)."""


def tensor(array: Array, name: str) -> Tensor:
    """``array`` as a detached tensor on the same device, in shared memory if possible.

    Raises KdxError for an array of anything but numbers, and TypeError for anything but an array.
    """
    if isinstance(array, Tensor):
        return array.detach()
    if isinstance(array, np.ndarray):
        if array.dtype.kind == "f":  # PyTorch supports neither other byte orders nor long doubles
            array = array.astype(array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64, copy=False)
        elif not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype.kind not in "fiub":
            raise KdxError(
                f"The {name} is an array of {array.dtype}, not of numbers.", f"Give the {name} as floating-point or integer numbers."
            )
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    raise TypeError(f"{name} must be a NumPy array or a PyTorch tensor, not {type(array).__name__}")


def like(result: Tensor, kind: ArrayT) -> ArrayT:
    """``result`` as a NumPy array if ``kind`` is one, else on the device of ``kind``."""
    return result.to(kind.device) if isinstance(kind, Tensor) else result.numpy(force=True)


def feature_map(array: Array, name: str) -> Tensor:
    """Features as [n, C, H, W]: [n, d] becomes [n, d, 1, 1]."""
    features = tensor(array, name)
    check_features(tuple(features.shape), str(features.dtype), features.dtype in _FLOATING, name)
    return features[:, :, None, None] if features.ndim == 2 else features


def check_features(shape: Sequence[int], dtype: str, floating: bool, name: str) -> None:
    """Raise KdxError unless the shape is [n, C, H, W] or [n, d] without a size of zero, and the type is a supported floating-point type."""
    if len(shape) not in (2, 4) or 0 in shape[1:]:
        raise KdxError(f"The {name} have shape {list(shape)}.", "Give feature maps [n, C, H, W] or vectors [n, d], with no size of zero.")
    if not floating:
        raise KdxError(
            f"The {name} are {dtype}, which is not a supported floating-point type.", "Give them as float16, bfloat16, float32 or float64."
        )


def check_images(n: int) -> None:
    """Raise KdxError for fewer than four images."""
    if n < MIN_IMAGES:
        raise KdxError(
            f"Distance geometry needs at least {MIN_IMAGES} images, and there are {n}.", "Give more images; scores are stable from 32."
        )


def check_batch_size(size: int) -> None:
    """Raise KdxError for a batch of fewer than four images."""
    if size < MIN_IMAGES:
        raise KdxError(
            f"A batch of {size} is too small for pairwise geometry.", f"Give a batch of {MIN_IMAGES} or more; scores are stable from 32."
        )


def batches_of(order: _Order, size: int) -> list[_Order]:
    """Split the images ``order`` [n] into ceil(n / size) batches, or fewer if a batch would have fewer than four images.

    The sizes of the batches differ by at most one. No batch has more than max(size, 7) images.
    """
    count = max(1, min(-(-len(order) // size), len(order) // MIN_IMAGES))
    return [order[start::count] for start in range(count)]


def check_same(n: int, other: int, name: str, other_name: str) -> None:
    """Raise KdxError if two arrays of the same images do not have the same number of rows."""
    if n != other:
        raise KdxError(
            f"There are {n} rows of {name} and {other} of {other_name}.", "Give one row per image, for the same images in the same order."
        )


def check_same_device(device: torch.device, other: torch.device, name: str, other_name: str) -> None:
    """Raise KdxError if the arrays ``name`` and ``other_name`` are on two devices."""
    if device != other:
        raise KdxError(f"The {other_name} are on {other}, and the {name} on {device}.", "Move both to one device.")


def rounding(x: Tensor) -> float:
    """The relative error that rounding causes in distances between rows x [n, d]."""
    return rounding_of(x.dtype, x[0].numel())


def rounding_of(dtype: torch.dtype, d: int) -> float:
    """`rounding` of rows [n, d]. Each entry has a relative error of eps; d entries average it out. The Gram product adds its own."""
    product = torch.promote_types(dtype, torch.float32)
    return float(4 * (torch.finfo(dtype).eps / d**0.5 + torch.finfo(product).eps))


def check_finite(x: Tensor, name: str) -> None:
    """Raise KdxError, with the row numbers, if rows of x [n, ...] contain NaN or infinity."""
    bad = ~x.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise not_finite(bad, name)


def not_finite(bad: Tensor, name: str) -> KdxError:
    """The error for rows that are not finite; ``bad`` [n] is true for those rows."""
    return KdxError(
        f"The {name} {'is' if name == TARGET else 'are'} not finite {rows_text(bad)}.",
        "Remove or repair those rows: NaN and infinity have no distances.",
    )


def rows_text(bad: Tensor, first: int = 0) -> str:
    """The numbers of the rows where ``bad`` [n] is true, at most five, as the end of a message. The first row has the number ``first``."""
    rows = (first + bad.nonzero().flatten()).tolist()
    return f"in rows {', '.join(map(str, rows[:5]))}{' ...' if len(rows) > 5 else ''}"


def check_distances(d: Tensor, x: Tensor, name: str) -> None:
    """Raise KdxError if distances d of rows x are not finite, or too large or too small to compute with.

    Only the small d is searched; x is read for the row numbers alone.
    """
    largest = float(d.amax())
    if not largest <= _LARGEST:  # in this form NaN fails too
        check_finite(x, name)
        raise too_large(name)
    if 0 < largest < 1 / _LARGEST:
        verb = "is" if name == TARGET else "are"
        raise KdxError(f"The {name} {verb} too close to zero: their products are zero in float64.", "Scale them up.")


def too_large(name: str) -> KdxError:
    """The error for finite rows whose distances overflow."""
    verb, owner = ("is", "its") if name == TARGET else ("are", "their")
    return KdxError(f"The {name} {verb} too large for {owner} precision.", "Scale them down, or give them as float64.")


def check_varied(centred: float, raw: float, rounding: float, name: str) -> None:
    """Raise KdxError if all images are equally far apart: ``centred`` = sum A_ij^2 is only rounding beside ``raw`` = sum D_ij^2."""
    if centred > rounding**2 * raw:
        return
    if name == TARGET:
        raise KdxError(
            "All images are equally far apart in the target: they are of one class, or each has a class of its own.",
            "Give images of at least two classes, with several images per class.",
        )
    raise constant(name)


def constant(name: str) -> KdxError:
    """The error for features in which all images are equally far apart."""
    return KdxError(
        f"The {name} are constant: all images are equally far from each other.",
        "Check the layer and the preprocessing; the features of a dead layer have no geometry.",
    )


def row_distances(rows: Mapping[str, Tensor], backend: TorchBackend) -> BatchDistances:
    """Distances [k, n, n] between the rows [n, ...] of each of k names, after `checked_distances`."""
    return checked_distances(torch.stack([backend.distances(x) for x in rows.values()]), rows)


def checked_distances(d: Tensor, rows: Mapping[str, Tensor]) -> BatchDistances:
    """Distances d [k, n, n] between the rows [n, ...] of each of k names, together with the U-centred distances.

    U-centred distances that are only rounding are zero. A target has whole rows of them: that of an image without others of its class,
    if all other classes are of one size. Decompositions of such an image are then zero as well, instead of a map of rounding.

    Raises KdxError if the distances of a name are not finite, or all equal: no correlation with them is defined.
    """
    for matrix, (name, x) in zip(d, rows.items(), strict=True):
        check_distances(matrix, x, name)
    centred = geometry.u_centered(d)
    centred.masked_fill_(centred.abs() <= _CENTRING_ROUNDING * d.amax((-2, -1), keepdim=True), 0)
    sums = zip(geometry.dot(centred, centred).tolist(), geometry.dot(d, d).tolist(), strict=True)
    for (remaining, whole), (name, x) in zip(sums, rows.items(), strict=True):
        check_varied(remaining, whole, rounding(x), name)
    return BatchDistances(d, centred)
