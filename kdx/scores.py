"""FSS and RS: how alike two networks' features are, and how relevant to the task, with their uncertainty.

Everything here is a function of inner products of centred distance matrices. Over batches the inner products are
summed and one ratio taken at the end (the mean of ratios would be biased). Intervals come from a jackknife: over batches where
there are several; over images where there is one set of up to 256, whose matrices are held; over random parts of the images where
there are more. p-values come from permutations of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from kdx import arrays
from kdx.arrays import Array
from kdx.errors import KdxError
from kdx.kernels import dispatch, geometry, sweep
from kdx.kernels.cuda import Backend
from kdx.kernels.sweep import Rows
from kdx.rows import Source, rows_of

Estimator = Literal["unbiased", "biased"]
Statistic = Callable[[Tensor], Tensor]
"""Inner products [..., k, k] -> values [...]."""

_FEW_IMAGES = 256
"""Up to about here one pass over n x n a permutation is quicker than a matrix product with its classes."""

TARGET = "target"

_CLASSES = 1024
"""Up to so many distinct rows of an embedding, their distances are a table; `_LOOKED_AT` rows tell whether that is worth trying."""

_LOOKED_AT = 4096

_HELD = 256
"""Up to so many images, matrices of all pairs are held; past it they are made in tiles."""

_BYTES = 1 << 27
"""Memory that batches take at once."""

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
    student: Source,
    teacher: Source,
    estimator: Estimator = "unbiased",
    *,
    batch: int | None = None,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> Score:
    """Feature similarity score: the (squared) distance correlation <A,B>/sqrt(<A,A><B,B>) of two networks' features.

    student, teacher: features of the same images, [n, C, H, W] or [n, d], NumPy or PyTorch, or on disk: numpy.memmap or a Zarr
    array; channels may differ. Any number of images: past 256, distances are made in tiles and thrown away, so that memory grows
    with n and not with its square. Scaling or rotating either changes nothing. ``unbiased`` (U-centring, range [-1, 1],
    about 0 for unrelated features) or ``biased`` (the V-statistic, in [0, 1], which reads about 1 for any two high-dimensional
    features of few images).
    Source: arXiv 2412.13943; Szekely and Rizzo, 2014.

    batch: how many images' distances make one set; the images are dealt to batches at random, and inner products are summed over
    batches. By default all images make one, which is exact. permutations: of the teacher's images, for the p-value (in batches, and
    past 256 images, each turns random parts of them). confidence: of the interval. seed: of batches and permutations.
    backend: as in `kdx.unicam`.

    Raises KdxError for n < 4, rows that do not match, features of two types or on two devices, constant or non-finite features.

    >>> import numpy as np, kdx
    >>> features = np.random.default_rng(0).normal(size=(40, 8))
    >>> round(kdx.fss(features, -3 * features).value, 6)
    1.0
    """
    named = {"student's features": rows_of(student, "student's features"), "teacher's features": rows_of(teacher, "teacher's features")}
    return _score(named, correlation, estimator, batch, permutations, confidence, seed, backend)


def rs(
    features: Source,
    target: Array,
    given: Source | None = None,
    estimator: Estimator = "unbiased",
    *,
    batch: int | None = None,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
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
    return _score(_relevance_inputs(features, target, given), statistic, estimator, batch, permutations, confidence, seed, backend)


def partial_rs(
    features: Source,
    target: Array,
    given: Source,
    estimator: Estimator = "unbiased",
    *,
    batch: int | None = None,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> Score:
    """Partial distance correlation of features and target: ``given`` is projected out of both (Szekely and Rizzo 2014). See `rs`."""
    return _score(_relevance_inputs(features, target, given), partial, estimator, batch, permutations, confidence, seed, backend)


def _relevance_inputs(features: Source, target: Array, given: Source | None) -> dict[str, Rows | Array]:
    named: dict[str, Rows | Array] = {"features": rows_of(features, "features"), TARGET: target}
    return named if given is None else named | {"given features": rows_of(given, "given features")}


def _score(
    named: Mapping[str, Rows | Array],
    statistic: Statistic,
    estimator: Estimator,
    batch: int | None,
    permutations: int,
    confidence: float,
    seed: int,
    backend: Backend,
) -> Score:
    """The score of rows and the target in the statistic's order; the second is what is permuted."""
    moved = list(named)[1]
    found = inner_products(named, [moved], estimator=estimator, batch=batch, permutations=permutations, seed=seed, backend=backend)
    if len(named) == 3:
        for explained in (0, 1):
            check_residual(found, explained, 2)
    products = found.products, found.left_out, permuted(found.products, 1, found.moved[moved])
    values = (statistic(each).numpy(force=True) for each in products)
    return summary(*values, n=found.n, batches=found.batches, estimator=estimator, confidence=confidence)


@dataclass(frozen=True)
class InnerProducts:
    """What scores are made of: inner products of k centred matrices of n images, summed over batches where there are several.

    names [k]: of the matrices. products [k, k]; left_out [units, k, k]: without each image, part of the images or batch; moved: a
    matrix whose images are permuted -> its products [p, k] with the others. raw [k]: <D,D> of the distances themselves; rounding [k]: of
    them, as a share.
    """

    names: tuple[str, ...]
    n: int
    batches: int
    products: Tensor
    left_out: Tensor
    moved: dict[str, Tensor]
    raw: Tensor
    rounding: Tensor


def inner_products(
    named: Mapping[str, Rows | Array],
    moved: Collection[str],
    *,
    estimator: Estimator = "unbiased",
    batch: int | None = None,
    permutations: int = 999,
    seed: int = 0,
    backend: Backend = "auto",
) -> InnerProducts:
    """Inner products of features by name and, under TARGET, labels or an embedding; arguments and errors are those of `fss` and `rs`."""
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator must be 'unbiased' or 'biased', not {estimator!r}")
    permutations, seed, batch = index(permutations), index(seed), None if batch is None else index(batch)
    if permutations < 0:
        raise ValueError(f"permutations must be 0 or more, not {permutations}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed must lie between 0 and 2^63, not {seed}")
    named = {name: _target(each) if name == TARGET else each for name, each in named.items()}
    features = {name: rows for name, rows in named.items() if not isinstance(rows, Tensor | np.ndarray)}
    first, *others = features
    n, device, dtype = features[first].shape[0], torch.device(features[first].device), features[first].dtype
    arrays.check_images(n)
    for name in others:
        rows = features[name]
        arrays.check_same(rows.shape[0], n, name, first)
        if rows.device != device:
            raise KdxError(f"The {first} are on {device}, the {name} on {rows.device}.", "Move all of them to one device.")
        if rows.dtype != dtype:
            raise KdxError(f"The {first} are {dtype}, the {name} {rows.dtype}.", "Give all of them in one type.")
    ops = dispatch.chosen(torch.empty(0, dtype=dtype, device=device), backend)
    asked = _Asked(n, device, tuple(moved), estimator == "biased", permutations, seed, ops)
    with torch.no_grad():
        if batch is not None and batch < n:
            return _batched(named, asked, batch)
        return _held(named, asked) if n <= _HELD else _swept(named, asked)


@dataclass(frozen=True)
class _Asked:
    n: int
    device: torch.device
    moved: tuple[str, ...]
    biased: bool
    permutations: int
    seed: int
    ops: dispatch.Torch


def _held(named: Mapping[str, Rows | Array], asked: _Asked) -> InnerProducts:
    """Of so few images that their matrices are held, in float64; the jackknife leaves out an image."""
    n, names = asked.n, tuple(named)
    everyone = torch.arange(n, device=asked.device)
    rows = [
        arrays.target_embedding(each, n).to(asked.device) if isinstance(each, Tensor | np.ndarray) else each.read(everyone)
        for each in named.values()
    ]
    d = torch.stack([arrays.measured(asked.ops.distances(each), each, name) for name, each in zip(names, rows, strict=True)])
    centred = geometry.double_centered(d) if asked.biased else geometry.u_centered(d)
    products = geometry.products(centred)
    table = permutation_table(n, asked.permutations, asked.seed, asked.device)
    return InnerProducts(
        names,
        n,
        1,
        products,
        geometry.leave_one_out(d, asked.biased) if n > arrays.MIN_IMAGES else products[None],
        {name: permutation_products(centred, d[i], centred[i], rows[i], table) for i, name in enumerate(names) if name in asked.moved},
        geometry.products(d).diagonal(),
        torch.tensor([arrays.rounding(each) for each in rows], dtype=torch.float64, device=asked.device),
    )


def _swept(named: Mapping[str, Rows | Array], asked: _Asked) -> InnerProducts:
    """Of any number of images, in tiles; the jackknife leaves out one of `sweep.UNITS` random parts."""
    names, matrices, rounding = _matrices(named, asked)
    moved = {name: names.index(name) for name in asked.moved}
    found = sweep.sweep(
        matrices, moved=[*moved.values()], permutations=asked.permutations, biased=asked.biased, seed=asked.seed, ops=asked.ops
    )
    raw = torch.stack([each.scale for each in matrices]) * asked.n / (asked.n - 3)
    _check_varied(names, found.products, raw, rounding.clamp_min(1e-8))  # sums over tiles are known to 1e-16 of them
    moved_products = {name: found.moved[place] for name, place in moved.items()}
    return InnerProducts(names, asked.n, 1, found.products, found.left_out, moved_products, raw, rounding)


def _batched(named: Mapping[str, Rows | Array], asked: _Asked, size: int) -> InnerProducts:
    """Summed over random batches, as many at once as memory allows; the jackknife leaves out a batch.

    Images are dealt blindly. A batch of one class has no geometry to add, and adds none: mending it would bias the sum.
    """
    if size < arrays.MIN_IMAGES:
        raise KdxError(f"A batch of {size} is too small for pairwise geometry.", "Give 4 or more; scores are steady from 32 up.")
    if size > sweep.TILE:
        raise KdxError(
            f"A batch of {size} images would hold matrices of {size} x {size}.",
            f"Give {sweep.TILE} at most, or no batch: all images together are then taken in tiles.",
        )
    names, matrices, rounding = _matrices(named, asked)
    generator = np.random.default_rng(asked.seed)
    count = max(1, min(-(-asked.n // size), asked.n // arrays.MIN_IMAGES))
    shuffled = torch.from_numpy(generator.permutation(asked.n)).to(asked.device)
    batches = [shuffled[start::count] for start in range(count)]
    widths = [each.rows.shape[1] * 4 if isinstance(each, sweep.Measured) else 0 for each in matrices]
    products, raw = [], []
    moved = {name: torch.zeros(asked.permutations, len(names), dtype=torch.float64, device=asked.device) for name in asked.moved}
    for some in _alike(batches, sum(widths), len(names)):
        n = some.shape[1]
        d = torch.stack([each.batches(some, asked.ops) for each in matrices], 1)
        centred = geometry.double_centered(d) if asked.biased else geometry.u_centered(d)
        products.append(geometry.products(centred) if asked.biased else asked.ops.products(d))
        raw.append(geometry.products(d).diagonal(dim1=1, dim2=2))
        turns = torch.from_numpy(generator.integers(n, size=(asked.permutations, len(some)))).to(asked.device)
        for name, total in moved.items():
            total += sweep.turned_products(centred, names.index(name), turns)
    each, whole = torch.cat(products), torch.cat(raw).sum(0)
    total = each.sum(0)
    _check_varied(names, total, whole, rounding)
    return InnerProducts(names, asked.n, len(each), total, total - each, moved, whole, rounding)


def _alike(batches: Sequence[Tensor], width: int, matrices: int) -> Iterator[Tensor]:
    """Batches of one size as indices [b, n], as many at a time as memory allows."""
    for n in sorted({len(batch) for batch in batches}):
        alike = torch.stack([batch for batch in batches if len(batch) == n])
        yield from alike.split(max(1, _BYTES // (n * (width + matrices * n * 64))))


def _matrices(named: Mapping[str, Rows | Array], asked: _Asked) -> tuple[tuple[str, ...], list[sweep.Matrix], Tensor]:
    """(names, matrices, the rounding of each one's distances)."""
    matrices = [
        _target_matrix(each, asked.n, asked.device) if isinstance(each, Tensor | np.ndarray) else _measured(each, name)
        for name, each in named.items()
    ]
    known = [(each.rows.dtype, each.rows.shape[1]) if isinstance(each, sweep.Measured) else (torch.float64, 1) for each in matrices]
    rounding = torch.tensor([arrays.rounding_of(*each) for each in known], dtype=torch.float64, device=asked.device)
    return tuple(named), matrices, rounding


def _target(target: Any) -> Array:
    """A target in memory; one in a Zarr array is small enough to read."""
    return arrays.tensor(np.asarray(target[...]) if hasattr(target, "oindex") else target, TARGET)


def _check_varied(names: Sequence[str], products: Tensor, raw: Tensor, rounding: Tensor) -> None:
    for name, own, whole, share in zip(names, products.diagonal().tolist(), raw.tolist(), rounding.tolist(), strict=True):
        arrays.check_varied(own, whole, share, name)


def _measured(rows: Rows, name: str) -> sweep.Measured:
    found = sweep.Measured.of(rows)
    suspect = torch.nonzero(~found.norms.isfinite()).flatten()
    if len(suspect):
        arrays.refuse_rows(suspect[[not bool(rows.read(row[None]).isfinite().all()) for row in suspect]], name)
        raise arrays.too_large(name)
    return found


def _target_matrix(target: Array, n: int, device: torch.device) -> sweep.Matrix:
    """Labels, and an embedding of few distinct rows, as classes; any other embedding as rows."""
    known = arrays.tensor(target, TARGET).to(device)
    arrays.check_same(known.shape[0] if known.ndim else 0, n, "the target", "features")
    if known.ndim == 1 and not known.is_floating_point():
        _, codes = known.unique(return_inverse=True)
        return sweep.Classes(codes)
    rows = arrays.target_embedding(known, n)
    arrays.check_finite(rows, TARGET)
    if len(rows[:_LOOKED_AT].unique(dim=0)) <= _CLASSES:
        distinct, codes = rows.unique(dim=0, return_inverse=True)
        if len(distinct) <= _CLASSES:
            return sweep.Classes(codes, geometry.distances(distinct))
    return _measured(rows_of(rows, TARGET), TARGET)


def check_residual(found: InnerProducts, explained: int, given: int) -> None:
    """KdxError where the given matrix explains another up to rounding of their distances."""
    own, cross, norm = (found.products[pair] for pair in ((explained, explained), (explained, given), (given, given)))
    # A difference of inner products is known to 1e-16 of them, whatever the features' type.
    floor = torch.maximum(found.rounding.max() ** 2 * found.raw[explained], 1e-13 * own)
    if not bool(own - cross**2 / norm > floor):
        raise KdxError(
            f"Nothing is left of the {found.names[explained]} without what the {found.names[given]} explain.",
            "Compare two different networks or layers.",
        )


def permutation_table(n: int, permutations: int, seed: int | Sequence[int], device: torch.device | None = None) -> Tensor:
    """Seeded permutations [permutations, n] of n images."""
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
