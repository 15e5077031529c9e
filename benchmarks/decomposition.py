"""The geometry of a batch with and without the shares of positions, from which all maps that add up to a score are made.

*Geometry* is `kdx.explain.layer.measure` without shares: UniCAM maps and every inner product. *Geometry and shares* is the same with the
shares of both networks in their inner products with the target, for each half of the images as context; both come from one pass over the
features. *Geometry, then W F* computes the shares afterwards by the expanded form, with a product for each context and network.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.comparison import Comparison, Run, gram_work, require_agreement
from benchmarks.geometry import networks
from kdx.explain.layer import LayerMethod, measure
from kdx.features.target import Target
from kdx.kernels import ambient, geometry
from kdx.kernels.decomposition import context_shares
from kdx.roles import TARGET
from kdx.scores import uncertainty

TOLERANCE = 1e-4
"""Largest difference of a share, divided by the largest share; of the sum of all shares from the inner product, and of an inner product,
divided by the largest inner product."""

ROLES = ("student", "base")


def comparison(_: Path, *, n: int, channels: int, height: int, width: int) -> Comparison:
    student, base, labels = networks(n, channels, height, width)
    features = dict(zip(ROLES, (student, base), strict=True))
    target, table = Target.of(labels), uncertainty.permutation_table(n, 0, 0)
    contexts = [slice(0, n, 2), slice(1, n, 2)]

    @ambient.neutral()  # as every public function that calls `measure`
    def without() -> dict[str, Tensor]:
        return {"products": measure(features, target, table, LayerMethod(shares=False)).products}

    def plain(_: ExitStack) -> Run:
        return without

    def together(_: ExitStack) -> Run:
        @ambient.neutral()
        def run() -> dict[str, Tensor]:
            result = measure(features, target, table)
            return {"products": result.products} | {role: result.shares[role, TARGET] for role in ROLES}

        return run

    def afterwards(_: ExitStack) -> Run:
        distances = {role: geometry.distances(features[role].flatten(1)) for role in ROLES}  # those of the geometry
        matrix = target.distances.centred[None] / (n * (n - 3))

        @ambient.neutral()
        def run() -> dict[str, Tensor]:
            shares = {role: context_shares(features[role].flatten(2), distances[role], matrix, contexts)[:, 0] for role in ROLES}
            return without() | {role: share.unflatten(2, (height, width)) for role, share in shares.items()}

        return run

    variants = {"geometry": plain, "geometry and shares": together, "geometry, then W F": afterwards}
    return Comparison(variants, _check, lambda: gram_work(n, channels * height * width))


def _check(results: Mapping[str, Any]) -> dict[str, float]:
    """The differences of each variant's products from the first one's, of its shares from the other variants', and of their sums."""
    figures: dict[str, float] = {}
    expected = next(iter(results.values()))["products"]
    shares: dict[str, Tensor] = {}
    for name, result in results.items():
        figures[f"products of {name}"] = float((result["products"] - expected).abs().max() / expected.abs().max())
        for number, role in enumerate(ROLES):
            if role not in result:
                continue
            first = shares.setdefault(role, result[role])
            figures[f"{role}'s shares of {name}"] = float((result[role] - first).abs().max() / first.abs().max())
            figures[f"{role}'s sum of {name}"] = float((result[role].sum() - expected[number, -1]).abs() / expected.abs().max())
    require_agreement(figures, TOLERANCE)
    return figures
