"""Every score of student, base and teacher at any number of layers, from features at hand: in memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping

from kdx.errors import KdxError
from kdx.features.arrays import Array
from kdx.features.rows import Source, rows_of
from kdx.kernels.cuda import Backend
from kdx.roles import TARGET, maps_among, permuted_among, roles_among
from kdx.scores import inner_products
from kdx.scores.pool import LayerScores, pooled_scores


def compare(
    features: Mapping[str, Mapping[str, Source]],
    target: Array,
    *,
    batch: int | None = None,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> dict[str, LayerScores]:
    """FSS and RS of every layer: how alike student and teacher are, and how relevant to the target is what each of them holds.

    features: layer -> role -> features of the same images, [n, C, H, W] or [n, d], as `kdx.fss` takes them; the roles are student and
    base, and the teacher where there is one. target: labels [n] or an embedding [n, e]. batch: how many images' distances make one
    set; by default all do, which is exact for any n (past 256, in tiles that are thrown away). permutations, confidence,
    seed, backend: as in `kdx.fss`.

    A layer's `scores` are those of `kdx.fss` and `kdx.rs` by name ("FSS(S,T)", "RS(S|B)" ...), its `contrasts` differences of two of
    them with intervals. Each network's distances are made once a layer, for all of these.

    Raises KdxError for what `kdx.fss` and `kdx.rs` refuse, and ValueError for other roles.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> student, base, labels = rng.normal(size=(60, 8)), rng.normal(size=(60, 8)), np.arange(60) % 3
    >>> found = kdx.compare({"layer4": {"student": student, "base": base}}, labels, permutations=99)
    >>> sorted(found["layer4"].scores)
    ['RS(B)', 'RS(B|S)', 'RS(S)', 'RS(S|B)']
    """
    if not features:
        raise KdxError("There are no features to compare.", "Give a layer's: {layer: {'student': ..., 'base': ...}}.")
    return {layer: _layer(layer, given, target, batch, permutations, confidence, seed, backend) for layer, given in features.items()}


def _layer(
    layer: str,
    given: Mapping[str, Source],
    target: Array,
    batch: int | None,
    permutations: int,
    confidence: float,
    seed: int,
    backend: Backend,
) -> LayerScores:
    roles = roles_among(given)
    names = {role: f"{role}'s features at {layer}" for role in roles} | {TARGET: TARGET}
    named = {names[role]: rows_of(given[role], names[role]) for role in roles}
    permuted = {role: names[role] for role in permuted_among(roles)}
    found = inner_products.inner_products(
        named | {TARGET: target}, [*permuted.values()], batch=batch, permutations=permutations, seed=seed, backend=backend
    )
    for explained, other in maps_among(roles).values():
        inner_products.check_residual(found, roles.index(explained), roles.index(other))
    products = {role: found.permuted[name] for role, name in permuted.items()}
    return pooled_scores(found.products, products, found.left_out, n=found.n, batches=found.batches, confidence=confidence, roles=roles)
