"""NumPy or PyTorch in, the same kind out; and what of an input can be said to be wrong before any geometry."""

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

ArrayT = TypeVar("ArrayT", NDArray[Any], Tensor, NDArray[Any] | Tensor)
"""NumPy in, NumPy out; Tensor in, Tensor out. An argument whose kind is not known gives a result whose kind is not known."""

_Order = TypeVar("_Order", NDArray[np.int64], Tensor)

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MIN_IMAGES = 4
"""The unbiased inner product divides by n(n - 3)."""


def tensor(array: Array, name: str) -> Tensor:
    """``array`` as a detached tensor on its own device, sharing memory where it can."""
    if isinstance(array, Tensor):
        return array.detach()
    if isinstance(array, np.ndarray):
        if array.dtype.kind == "f":  # PyTorch knows neither other byte orders nor long doubles
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
    """``result`` as a NumPy array if ``kind`` is one, else unchanged."""
    return result if isinstance(kind, Tensor) else result.numpy(force=True)


def feature_map(array: Array, name: str) -> Tensor:
    """Features as [n, C, H, W]: [n, d] becomes [n, d, 1, 1]."""
    features = tensor(array, name)
    check_features(tuple(features.shape), str(features.dtype), features.dtype in _FLOATING, name)
    return features[:, :, None, None] if features.ndim == 2 else features


def check_features(shape: Sequence[int], dtype: str, floating: bool, name: str) -> None:
    """KdxError for what cannot be features of images."""
    if len(shape) not in (2, 4) or 0 in shape[1:]:
        raise KdxError(f"The {name} have shape {list(shape)}.", "Give feature maps [n, C, H, W] or vectors [n, d], with no size of zero.")
    if not floating:
        raise KdxError(
            f"The {name} are {dtype}, not floating-point numbers that kdx knows.", "Give them as float16, bfloat16, float32 or float64."
        )


def check_images(n: int) -> None:
    if n < MIN_IMAGES:
        raise KdxError(
            f"Distance geometry needs at least {MIN_IMAGES} images; here are {n}.", "Give more images; scores settle from about 32."
        )


def check_batch_size(size: int) -> None:
    if size < MIN_IMAGES:
        raise KdxError(
            f"A batch of {size} is too small for pairwise geometry.", f"Give a batch of {MIN_IMAGES} or more; scores are steady from 32 up."
        )


def batches_of(order: _Order, size: int) -> list[_Order]:
    """The images ``order`` [n] in ceil(n / size) batches whose sizes differ by at most one.

    There are fewer batches if they would have under four images. No batch has more than max(size, 7) images.
    """
    count = max(1, min(-(-len(order) // size), len(order) // MIN_IMAGES))
    return [order[start::count] for start in range(count)]


def check_same(n: int, other: int, name: str, other_name: str) -> None:
    if n != other:
        raise KdxError(
            f"There are {n} rows of {name} and {other} of {other_name}.", "Give one row an image, of the same images in the same order."
        )


def pixels(images: Array) -> Tensor:
    """Images as a tensor [n, 3, h, w], n >= 1, of a floating-point type; KdxError for anything else."""
    batch = tensor(images, "images")
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point() or len(batch) == 0:
        raise KdxError(
            f"The images have shape {list(batch.shape)} and type {batch.dtype}.",
            "Give at least one image: floating-point RGB [n, 3, height, width] in [0, 1].",
        )
    return batch


def rounding(x: Tensor) -> float:
    """What rounding makes of distances between rows x [n, d], as a share of them."""
    return rounding_of(x.dtype, x[0].numel())


def rounding_of(dtype: torch.dtype, d: int) -> float:
    """`rounding` of rows [n, d]: each entry is known to eps of its type, which d entries average out; the Gram product adds its own."""
    product = torch.promote_types(dtype, torch.float32)
    return float(4 * (torch.finfo(dtype).eps / d**0.5 + torch.finfo(product).eps))


def check_finite(x: Tensor, name: str) -> None:
    """KdxError that names the rows of x [n, ...] that contain NaN or infinity."""
    bad = ~x.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise not_finite(bad, name)


def not_finite(bad: Tensor, name: str) -> KdxError:
    """The error for rows [n] that are not finite where ``bad`` is true."""
    return KdxError(
        f"The {name} {'is' if name == TARGET else 'are'} not finite {rows_text(bad)}.",
        "Remove or repair those rows: NaN and infinity have no distances.",
    )


def rows_text(bad: Tensor, first: int = 0) -> str:
    """For the end of a message: the rows where ``bad`` [n] is true, at most five, counted from ``first``."""
    rows = (first + bad.nonzero().flatten()).tolist()
    return f"in rows {', '.join(map(str, rows[:5]))}{' ...' if len(rows) > 5 else ''}"


def check_distances(d: Tensor, x: Tensor, name: str) -> None:
    """KdxError if distances d from rows x are not finite. Only d, which is small, is searched; x is read to name the rows."""
    if not bool(d.isfinite().all()):
        check_finite(x, name)
        raise too_large(name)


def too_large(name: str) -> KdxError:
    verb, owner = ("is", "its") if name == TARGET else ("are", "their")
    return KdxError(f"The {name} {verb} too large for {owner} precision.", "Scale them down, or give them as float64.")


def check_varied(centred: float, raw: float, rounding: float, name: str) -> None:
    """KdxError if all images are equally far apart: sum A_ij^2 of the centred distances is only rounding beside sum D_ij^2."""
    if centred > rounding**2 * raw:
        return
    if name == TARGET:
        raise KdxError(
            "The target sets all images equally far apart: they are of one class, or each of its own.",
            "Give images of at least two classes, several of a class.",
        )
    raise KdxError(
        f"The {name} are constant: all images are equally far from each other.",
        "Look at the layer and the preprocessing; a dead layer has no geometry.",
    )


def checked_distances(rows: Mapping[str, Tensor], backend: TorchBackend) -> BatchDistances:
    """Distances [k, n, n] between the rows [n, ...] of each name, with the checks of `centred_distances`."""
    return centred_distances(torch.stack([backend.distances(x) for x in rows.values()]), rows)


def centred_distances(d: Tensor, rows: Mapping[str, Tensor]) -> BatchDistances:
    """Distances d [k, n, n] between the rows [n, ...] of each name, with the U-centred ones.

    Raises KdxError, which contains the name, if distances are not finite, or are all equal: no correlation with them is defined.
    """
    for matrix, (name, x) in zip(d, rows.items(), strict=True):
        check_distances(matrix, x, name)
    centred = geometry.u_centered(d)
    sums = zip(geometry.dot(centred, centred).tolist(), geometry.dot(d, d).tolist(), strict=True)
    for (remaining, whole), (name, x) in zip(sums, rows.items(), strict=True):
        check_varied(remaining, whole, rounding(x), name)
    return BatchDistances(d, centred)
