"""FSS and RS: how alike two networks' features are, and how relevant to the task, with their uncertainty.

Everything here is a function of inner products of centred distance matrices. Over batches the inner products are
summed and one ratio taken at the end (the mean of ratios would be biased); intervals come from a jackknife, over batches
where there are several and over images where there is one; p-values from permutations of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from kdx import arrays
from kdx.arrays import Array
from kdx.errors import KdxError
from kdx.kernels import geometry

Estimator = Literal["unbiased", "biased"]
Statistic = Callable[[Tensor], Tensor]
"""Inner products [..., k, k] -> values [...]."""

_FEW_IMAGES = 128
"""Up to about here one pass over n x n a permutation is quicker than a matrix product with its classes."""

_EDGE = 1 - 1e-12
"""Fisher's z of a correlation of one is infinite; no float64 score is known closer than this."""


@dataclass(frozen=True)
class Score:
    """A similarity or relevance score.

    value: in [-1, 1]; 0 is expected of unrelated features (unbiased estimator), 1 is the same geometry.
    interval: jackknife confidence interval of ``value``, on Fisher's z scale; NaN-free: (-1, 1) where too little is known.
    p_value: one-sided, the share of permutations of the images that score at least as high; None without permutations.
    n: images. batches: how many sets their geometry was measured in.

    A score compares geometries, image pair by image pair. It does not say that one network caused the other's.
    """

    value: float
    interval: tuple[float, float]
    p_value: float | None
    n: int
    batches: int = 1
    estimator: Estimator = "unbiased"
    confidence: float = 0.95
    permutations: int = 0

    def __float__(self) -> float:
        return self.value


def correlation(products: Tensor) -> Tensor:
    """<X,Y>/sqrt(<X,X><Y,Y>) from inner products [..., 2, 2] of (X, Y)."""
    return products[..., 0, 1] / (products[..., 0, 0] * products[..., 1, 1]).sqrt()


def semipartial(products: Tensor) -> Tensor:
    """<R,G>/sqrt(<R,R><G,G>), R = X - (<X,Y>/<Y,Y>) Y, from inner products [..., 3, 3] of (X, G, Y)."""
    left = _projected(products)
    return left[..., 0, 1] / (left[..., 0, 0] * products[..., 1, 1]).sqrt()


def partial(products: Tensor) -> Tensor:
    """As `semipartial`, with Y projected out of G too (Szekely and Rizzo 2014)."""
    return correlation(_projected(products))


def _projected(products: Tensor) -> Tensor:
    """Inner products of X and G without their Y-components."""
    xy = products[..., :2, 2]
    return products[..., :2, :2] - xy[..., :, None] * xy[..., None, :] / products[..., 2:, 2:]


def fss(
    student: Array,
    teacher: Array,
    estimator: Estimator = "unbiased",
    *,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
) -> Score:
    """Feature similarity score: the (squared) distance correlation <A,B>/sqrt(<A,A><B,B>) of two networks' features.

    student, teacher: features of the same images, [n, C, H, W] or [n, d], NumPy or PyTorch; channels may differ. Scaling
    or rotating either changes nothing. ``unbiased`` (U-centring, range [-1, 1], about 0 for unrelated features) or ``biased``
    (the V-statistic, in [0, 1], which reads about 1 for any two high-dimensional features of few images).
    Source: arXiv 2412.13943; Szekely and Rizzo, 2014.

    Raises KdxError for n < 4, rows that do not match, constant or non-finite features.

    >>> import numpy as np, kdx
    >>> features = np.random.default_rng(0).normal(size=(40, 8))
    >>> round(kdx.fss(features, -3 * features).value, 6)
    1.0
    """
    x, y = arrays.feature_map(student, "student's features"), arrays.feature_map(teacher, "teacher's features")
    arrays.check_same(y.shape[0], x.shape[0], "the teacher's features", "the student's")
    named = (("student's features", x.flatten(1)), ("teacher's features", y.flatten(1)))
    return _score(named, correlation, estimator, permutations, confidence, seed)


def rs(
    features: Array,
    target: Array,
    given: Array | None = None,
    estimator: Estimator = "unbiased",
    *,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
) -> Score:
    """Relevance score: the distance correlation of features with the target's geometry.

    target: integer labels [n] or an embedding [n, e]. With ``given``, the semi-partial score RS(X|Y): what ``given``'s features
    explain is projected out of X only, as published; `partial_rs` projects it out of the target too.
    For n, estimators and errors see `fss`; a target with one class is a KdxError, and so are features that ``given`` explains wholly.

    >>> import numpy as np, kdx
    >>> labels = np.arange(40) % 4
    >>> round(kdx.rs(np.eye(4)[labels], labels).value, 6)
    1.0
    """
    statistic = correlation if given is None else semipartial
    return _score(_relevance_inputs(features, target, given), statistic, estimator, permutations, confidence, seed)


def partial_rs(
    features: Array,
    target: Array,
    given: Array,
    estimator: Estimator = "unbiased",
    *,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
) -> Score:
    """Partial distance correlation of features and target: ``given`` is projected out of both (Szekely and Rizzo 2014). See `rs`."""
    return _score(_relevance_inputs(features, target, given), partial, estimator, permutations, confidence, seed)


def _relevance_inputs(features: Array, target: Array, given: Array | None) -> tuple[tuple[str, Tensor], ...]:
    x = arrays.feature_map(features, "features").flatten(1)
    g = arrays.target_embedding(target, x.shape[0]).to(x.device)
    if given is None:
        return ("features", x), ("target", g)
    y = arrays.feature_map(given, "given features").flatten(1)
    arrays.check_same(y.shape[0], x.shape[0], "given features", "features")
    return ("features", x), ("target", g), ("given features", y)


def _score(
    named: Sequence[tuple[str, Tensor]], statistic: Statistic, estimator: Estimator, permutations: int, confidence: float, seed: int
) -> Score:
    """The score of one set of images, from (name, rows [n, d]) in the statistic's order; the second is what is permuted."""
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator must be 'unbiased' or 'biased', not {estimator!r}")
    n = named[0][1].shape[0]
    arrays.check_images(n)
    if len({rows.device for _, rows in named}) > 1:
        raise KdxError("The features are on different devices.", "Move all of them to one device.")
    with torch.no_grad():
        d = torch.stack([arrays.measured(geometry.distances(rows), rows, name) for name, rows in named])
        centred = geometry.u_centered(d) if estimator == "unbiased" else geometry.double_centered(d)
        products = geometry.products(centred)
        if len(named) == 3:
            _check_residual(products, geometry.products(d), max(arrays.rounding(rows) for _, rows in named))
        left_out = geometry.leave_one_out(d, biased=estimator == "biased") if n > arrays.MIN_IMAGES else products[None]
        moved = permuted(
            products, 1, permutation_products(centred, d[1], centred[1], named[1][1], permutation_table(n, permutations, seed, d.device))
        )
    values = statistic(products), statistic(left_out), statistic(moved)
    return summary(*(v.cpu().numpy() for v in values), n=n, batches=1, estimator=estimator, confidence=confidence)


def _check_residual(products: Tensor, distances: Tensor, rounding: float) -> None:
    """KdxError where the third matrix, the given one, explains the first or the second up to rounding of their distances."""
    left = _projected(products)
    for index, name in enumerate(("features", "target")):
        # A difference of inner products is known to 1e-16 of them, whatever the features' type.
        floor = torch.maximum(rounding**2 * distances[index, index], 1e-13 * products[index, index])
        if not bool(left[index, index] > floor):
            raise KdxError(f"The {name} hold nothing that the given features do not explain.", "Compare two different networks or layers.")


def permutation_table(n: int, permutations: int, seed: int | Sequence[int], device: torch.device | None = None) -> Tensor:
    """Seeded permutations [permutations, n] of n images."""
    if permutations < 0:
        raise ValueError(f"permutations must be 0 or more, not {permutations}")
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)).to(device)


def permutation_products(matrices: Tensor, d: Tensor, centred: Tensor, rows: Tensor, permutations: Tensor) -> Tensor:
    """Inner products [p, k] of centred matrices with ``centred`` (of distances d, of rows [n, e]) under permutations of its images."""
    if len(permutations) == 0:
        return matrices.new_zeros(0, len(matrices))
    n = rows.shape[0]
    if rows.shape[1] <= n:
        distinct, classes = rows.unique(dim=0, return_inverse=True)
        if n > _FEW_IMAGES and 4 * len(distinct) <= n:
            return geometry.permuted_class_products(matrices, d, classes, permutations)
    return geometry.permuted_products(matrices, centred, permutations)


def permuted(products: Tensor, moved: int, rows: Tensor) -> Tensor:
    """Inner products [p, k, k] under permutations of matrix ``moved``, whose products with all matrices became rows [p, k]."""
    result = products.expand(len(rows), *products.shape).clone()
    own = products[moved, moved]
    result[:, moved, :] = rows
    result[:, :, moved] = rows
    result[:, moved, moved] = own  # permuting a matrix leaves its norm
    return result


def summary(
    value: NDArray[np.float64],
    left_out: NDArray[np.float64],
    moved: NDArray[np.float64] | None,
    *,
    n: int,
    batches: int,
    estimator: Estimator = "unbiased",
    confidence: float = 0.95,
) -> Score:
    """A Score from its value [], its jackknife replicates [units] and its permuted values [p]."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if not np.isfinite(value):
        raise ValueError("the score is not a number")  # what can make it so is refused before
    permutations = 0 if moved is None else len(moved)
    p_value = None
    if moved is not None and permutations:
        # Equal to rounding counts as at least as high, so that a tie never makes a result significant.
        p_value = (1 + int((moved >= value - 1e-12).sum())) / (1 + permutations)
    return Score(
        float(value), jackknife_interval(float(value), left_out, confidence), p_value, n, batches, estimator, confidence, permutations
    )


def jackknife_interval(value: float, left_out: NDArray[np.float64], confidence: float, *, fisher: bool = True) -> tuple[float, float]:
    """value +/- t_{u-1} * sqrt((u-1)/u * sum (theta_i - mean)^2) over u units left out in turn; u < 2 says nothing.

    On Fisher's z scale (the interval stays inside [-1, 1]) unless ``fisher`` is False, as for a difference of scores.
    """
    units = len(left_out)
    if units < 2 or not np.isfinite(left_out).all():
        return (-1.0, 1.0) if fisher else (-2.0, 2.0)
    replicates = np.arctanh(np.clip(left_out, -_EDGE, _EDGE)) if fisher else left_out
    error = np.sqrt((units - 1) / units * np.square(replicates - replicates.mean()).sum())
    reach = float(stats.t.ppf(0.5 + confidence / 2, units - 1) * error)
    if not fisher:
        return value - reach, value + reach
    centre = np.arctanh(np.clip(value, -_EDGE, _EDGE))
    return float(np.tanh(centre - reach)), float(np.tanh(centre + reach))
