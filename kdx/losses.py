"""Distance correlation (FSS) and relevance (RS) as differentiable functions of features, for training.

Values are those of `kdx.fss`, `kdx.rs` and `kdx.partial_rs`. The gradient is a closed form, so no array of n x n x d differences is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.features.target import Target
from kdx.kernels import ambient, geometry
from kdx.roles import TARGET
from kdx.scores.inner_products import explained_completely
from kdx.scores.score import Estimator

_COLUMNS = 1 << 14
"""Columns of the features that one step of the backward pass widens to float64."""

_GIVEN = "given features"


@ambient.full_precision()
def distance_correlation(x: Tensor, y: Tensor, estimator: Estimator = "unbiased") -> Tensor:
    """The squared distance correlation of two feature batches, differentiable with respect to both: the FSS of `kdx.fss`.

        <A,B>/sqrt(<A,A><B,B>)

    with A and B the centred distance matrices [n, n] of x and y. Use ``1 - distance_correlation(student, teacher)`` to bring two
    geometries together, or add the value itself to a loss to keep them apart. Source: Szekely, Rizzo and Bakirov, "Measuring and testing
    dependence by correlation of distances", Annals of Statistics 35 (2007); as a training loss: Zhen et al., "On the Versatile Uses of
    Partial Distance Correlation in Deep Learning", ECCV 2022.

    x, y: tensors of the features of the same n images, [n, C, H, W] or [n, d], n >= 4, of any floating-point type, on one device. Their
    types and widths may differ. estimator: as in `kdx.fss`. Returns a scalar in [-1, 1], in float32, or in float64 if x or y is. Distances
    and gradients are computed in float64 from the features as they are, also under autocast. Memory grows with n x n.

    Two images at the same place have no direction in which to move apart, so such a pair contributes no gradient: the gradient is a number
    everywhere, and second derivatives are supported.

    The unbiased estimator of a small batch is noisy (its standard deviation is about 0.045 for n = 32 unrelated images). A high
    value does not make the student accurate: combine it with a loss of the task.

    Raises KdxError for n < 4, numbers of rows that differ, two devices, and features that are constant or not finite. Raises TypeError for
    anything but tensors, and ValueError for an unknown estimator.

    >>> import torch, kdx
    >>> teacher = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    >>> student = teacher[:, :4].clone().requires_grad_()
    >>> loss = 1 - kdx.losses.distance_correlation(student, teacher)
    >>> loss.backward()
    >>> student.grad.shape
    torch.Size([16, 4, 3, 3])
    """
    named = {"first features": x, "second features": y}
    centred = _centred(named, estimator)
    return geometry.correlation(*(matrix for matrix, _ in centred.values())).to(_result_type(x, y))


@ambient.full_precision()
def relevance(x: Tensor, target: Array, given: Tensor | None = None, estimator: Estimator = "unbiased", *, partial: bool = False) -> Tensor:
    """The relevance score of features to a target, optionally beyond other features, differentiable: the RS of `kdx.rs`.

        RS(X) = <A,G>/sqrt(<A,A><G,G>),        RS(X|Y) = <R,G>/sqrt(<R,R><G,G>),  R = A - (<A,B>/<B,B>) B

    with A, B and G the centred distance matrices [n, n] of x, ``given`` and the target. Use ``1 - relevance(student, labels)`` to raise the
    relevance of a student, or ``1 - relevance(student, labels, base)`` to raise what it has beyond another network.

    x, given: tensors as in `distance_correlation`; both receive gradients, so detach ``given`` if it is to stay as it is. target: integer
    labels [n], or an embedding [n, e], which receives a gradient too if it is a floating-point tensor that requires one. partial: project
    ``given`` out of the target too, as in `kdx.partial_rs`. Type, range, memory and coincident images are those of
    `distance_correlation`.

    The gradient shows how distances would have to change to follow the target more closely. It does not make the classes separable by the
    network's own head.

    Raises KdxError for what `distance_correlation` refuses, for a target with one class or one image per class, and for features (with
    ``partial``: also a target) that ``given`` explains completely. Raises ValueError for ``partial`` without ``given``.

    >>> import torch, kdx
    >>> labels = torch.arange(16) % 4
    >>> features = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    >>> score = kdx.losses.relevance(features, labels)
    >>> bool(abs(score.item() - kdx.rs(features, labels).value) < 1e-9), score.requires_grad
    (True, True)
    """
    if partial and given is None:
        raise ValueError("partial projects the given features out of the target: give them")
    _check_tensor(x, "features")
    embedding = isinstance(target, Tensor) and target.is_floating_point() and target.ndim == 2
    known = Target.of(target, len(x), device=x.device)  # checks the target, and has no gradient
    rows = target.to(x.device) if isinstance(target, Tensor) and embedding else known.rows
    centred = _centred({"features": x, TARGET: rows} | ({} if given is None else {_GIVEN: given}), estimator)
    (a, _), (g, _) = centred["features"], centred[TARGET]
    if given is not None:
        a = _residual("features", centred)
        g = _residual(TARGET, centred) if partial else g
    return geometry.correlation(a, g).to(_result_type(x, *(() if given is None else (given,))))


def _centred(named: dict[str, Tensor], estimator: Estimator) -> dict[str, tuple[Tensor, float]]:
    """By name: the centred distance matrix [n, n] in float64, and the norm below which such a matrix is only rounding."""
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator must be 'unbiased' or 'biased', not {estimator!r}")
    first, x = next(iter(named.items()))
    centred = {}
    for name, rows in named.items():
        _check_tensor(rows, name)
        arrays.check_features(tuple(rows.shape), str(rows.dtype), rows.is_floating_point(), name)
        arrays.check_same(len(rows), len(x), name, first)
        arrays.check_images(len(rows))
        arrays.check_same_device(rows.device, x.device, name, first)
        d: Tensor = _Distances.apply(rows.flatten(1))  # type: ignore[no-untyped-call]
        arrays.check_distances(d.detach(), rows.detach(), name)
        matrix = geometry.double_centered(d) if estimator == "biased" else geometry.u_centered(d)
        rounding, raw = arrays.rounding(rows), float(geometry.dot(d, d).detach())
        arrays.check_varied(float(geometry.dot(matrix, matrix).detach()), raw, rounding, name)
        centred[name] = matrix, rounding * raw**0.5
    return centred


def _residual(name: str, centred: dict[str, tuple[Tensor, float]]) -> Tensor:
    """The matrix of this name without what the given features explain. KdxError if that is only rounding."""
    (matrix, floor), (given, _) = centred[name], centred[_GIVEN]
    residual = geometry.residual(matrix, given)
    if not float(geometry.dot(residual, residual).detach()) ** 0.5 > floor:
        raise explained_completely(name, _GIVEN)
    return residual


def _check_tensor(rows: Any, name: str) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"the {name} must be a PyTorch tensor, which can have a gradient, not {type(rows).__name__}")


def _result_type(*features: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


class _Distances(torch.autograd.Function):
    """Distances [n, n] in float64 between rows x [n, d], with their gradient by x.

    With M = dL/dD and W_ij = (M_ij + M_ji)/D_ij, or 0 for images at the same place: dL/dX = (diag(W 1) - W) X. The backward pass is made of
    differentiable operations, so it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        d = geometry.distances(x)
        ctx.save_for_backward(x, d)
        return d

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, d = ctx.saved_tensors
        (matrix,) = gradients
        with ambient.full_precision():
            weights = geometry.pair_weights(matrix + matrix.mT, d)
            # Near-duplicates put large opposite numbers into this matrix, which cancel well only in float64.
            laplacian = torch.diag(weights.sum(1)) - weights
            mean = x.detach().mean(0, dtype=torch.float64)
            parts = [
                (laplacian @ (part.double() - centre)).to(x.dtype)
                for part, centre in zip(x.split(_COLUMNS, 1), mean.split(_COLUMNS), strict=True)
            ]
        return torch.cat(parts, 1)
