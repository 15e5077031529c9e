"""FSS and RS of features in memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping

from kdx.features.arrays import Array
from kdx.features.rows import Source, rows_of
from kdx.kernels.cuda import Backend
from kdx.kernels.tiles import Rows
from kdx.roles import TARGET
from kdx.scores.inner_products import check_residual, inner_products
from kdx.scores.score import Estimator, Score, Statistic, correlation, partial, semipartial, summary
from kdx.scores.uncertainty import with_permuted


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
    permuted = list(named)[1]
    found = inner_products(named, [permuted], estimator=estimator, batch=batch, permutations=permutations, seed=seed, backend=backend)
    if len(named) == 3:
        for explained in (0, 1):
            check_residual(found, explained, 2)
    products = found.products, found.left_out, with_permuted(found.products, 1, found.permuted[permuted])
    values = (statistic(each).numpy(force=True) for each in products)
    return summary(*values, n=found.n, batches=found.batches, estimator=estimator, confidence=confidence)
