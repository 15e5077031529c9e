"""The feature similarity score and the relevance scores, from features in memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping

from kdx.features.arrays import Labels
from kdx.features.rows import Source, UnitRows, rows_of
from kdx.kernels import ambient
from kdx.kernels.cuda import Backend
from kdx.kernels.tiles import Rows
from kdx.roles import TARGET
from kdx.scores.inner_products import Sampling, check_residual, inner_products
from kdx.scores.score import Estimator, Score, Statistic, correlation, estimate, partial, semipartial, summary
from kdx.scores.uncertainty import with_permuted


@ambient.neutral()
def fss(
    student: Source,
    teacher: Source,
    estimator: Estimator = "unbiased",
    *,
    unit_length: bool = False,
    batch: int | None = None,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> Score:
    """Feature similarity score: the squared distance correlation of two networks' features.

        FSS = <A,B>/sqrt(<A,A><B,B>)

    with A and B the centred distance matrices [n, n] of the student's and the teacher's features. Scaling, rotating or shifting either
    network's features does not change it. Source: Adhane et al., arXiv 2412.13943; Szekely and Rizzo, "Partial distance correlation with
    methods for dissimilarities", Annals of Statistics 42 (2014).

    student, teacher: features of the same images, [n, C, H, W] or [n, d], of one floating-point type and on one device: NumPy, PyTorch,
    or on disk as a numpy.memmap or a Zarr array. Their channels may differ. n may be any number from 4: above 256 images, distances are
    computed in tiles and not kept, so memory grows with n and not with n x n.
    estimator: ``unbiased`` (U-centring) is in [-1, 1] and expected to be 0 for unrelated features. ``biased`` (the V-statistic) is in
    [0, 1] and is about 1 for any two high-dimensional features of few images; it is offered for comparison only.
    unit_length: divide the features of every image by their Euclidean norm first; the score then compares directions alone.
    batch: the number of images in a set of distances. Images are assigned to batches at random, and inner products are summed over
    batches. By default all images are one set, which is exact.
    permutations: how many permutations of the teacher's images the p-value uses. In batches, and above 256 images, a permutation rotates
    random parts of the images.
    confidence: of the interval, in (0, 1). The interval leaves out single images, or 32 random parts of more than 256 images, whatever the
    batches; from 20 batches on it leaves out batches. seed: of batches and permutations, from 0. backend: as in `kdx.unicam`.

    A score does not show that one network caused the features of the other, and similar features need not be relevant to a task; see `rs`.

    Raises KdxError for n < 4, numbers of rows that differ, features of two types or on two devices, features that are constant or not
    finite, and a batch under 4 or above 1024. Raises ValueError for other arguments out of range.

    >>> import numpy as np, kdx
    >>> features = np.random.default_rng(0).normal(size=(40, 8))
    >>> round(kdx.fss(features, -3 * features).value, 6)
    1.0
    """
    named = {"student's features": rows_of(student, "student's features"), "teacher's features": rows_of(teacher, "teacher's features")}
    if unit_length:
        named = {name: UnitRows(rows) for name, rows in named.items()}
    return _score(named, correlation, Sampling(estimator, batch, permutations, confidence, seed, backend))


@ambient.neutral()
def rs(
    features: Source,
    target: Labels,
    given: Source | None = None,
    estimator: Estimator = "unbiased",
    *,
    batch: int | None = None,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> Score:
    """Relevance score: the squared distance correlation of features with the target, optionally beyond another network's features.

        RS(X) = <A,G>/sqrt(<A,A><G,G>),        RS(X|Y) = <R,G>/sqrt(<R,R><G,G>),  R = A - (<A,B>/<B,B>) B

    with A, B and G the centred distance matrices [n, n] of the features X, the given features Y and the target. RS(X|Y) is a
    semi-partial correlation, as published: what Y explains is projected out of X only; `partial_rs` projects it out of the target too.
    Source: Adhane et al., arXiv 2412.13943.

    features, given: in any form that `fss` takes. target: integer labels [n] or an embedding [n, e]; its images are permuted for the
    p-value. The other arguments are those of `fss`. RS is in [-1, 1]; with the unbiased estimator, 0 is expected for features that are
    unrelated to the target.

    A score describes the geometry of the features. It is not an accuracy, and it does not show that a prediction uses the features.

    Raises KdxError for what `fss` refuses, for a target with one class or one image per class, and for features that ``given`` explains
    completely.

    >>> import numpy as np, kdx
    >>> labels = np.arange(40) % 4
    >>> round(kdx.rs(np.eye(4)[labels], labels).value, 6)
    1.0
    """
    statistic = correlation if given is None else semipartial
    sampling = Sampling(estimator, batch, permutations, confidence, seed, backend)
    return _score(_relevance_inputs(features, target, given), statistic, sampling)


@ambient.neutral()
def partial_rs(
    features: Source,
    target: Labels,
    given: Source,
    estimator: Estimator = "unbiased",
    *,
    batch: int | None = None,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> Score:
    """Partial relevance score: like RS(X|Y) of `rs`, but the given features are projected out of the target too.

        <R,S>/sqrt(<R,R><S,S>),        R = A - (<A,B>/<B,B>) B,  S = G - (<G,B>/<B,B>) B

    This is the partial distance correlation of Szekely and Rizzo (2014). Arguments, range and errors are those of `rs`; a target that
    ``given`` explains completely raises KdxError too.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(40) % 4
    >>> unrelated = rng.normal(size=(40, 8))
    >>> round(kdx.partial_rs(np.eye(4)[labels], labels, unrelated).value, 6)
    1.0
    """
    sampling = Sampling(estimator, batch, permutations, confidence, seed, backend)
    return _score(_relevance_inputs(features, target, given), partial, sampling)


def _relevance_inputs(features: Source, target: Labels, given: Source | None) -> dict[str, Rows | Labels]:
    named: dict[str, Rows | Labels] = {"features": rows_of(features, "features"), TARGET: target}
    return named if given is None else named | {"given features": rows_of(given, "given features")}


def _score(named: Mapping[str, Rows | Labels], statistic: Statistic, sampling: Sampling) -> Score:
    """The statistic of these matrices, in this order. The images of the second one are permuted."""
    permuted = list(named)[1]
    sums = inner_products(named, [permuted], sampling)
    if len(named) == 3:
        for explained in (0, 1):
            check_residual(sums, explained, 2)
    null = statistic(with_permuted(sums.products, 1, sums.permuted[permuted])).numpy(force=True)
    return summary(
        estimate(statistic, sums.products),
        sums.moments,
        null,
        n=sums.n,
        batches=sums.batches,
        estimator=sampling.estimator,
        confidence=sampling.confidence,
    )
