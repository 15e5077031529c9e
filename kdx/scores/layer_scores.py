"""All scores of one layer, and the blocks of tiles from which they follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kdx.features.arrays import Labels
from kdx.features.rows import Source, rows_of
from kdx.kernels.tiles import Rows, Sweep
from kdx.roles import TARGET, pairs_among, permuted_among, roles_among
from kdx.scores.inner_products import Sampling, block_count, check_residual, inner_products, sweep_of
from kdx.scores.pool import LayerScores, pooled_scores


@dataclass(frozen=True)
class Measure:
    """Measures the features of a layer by role. It is sent to workers. target, sampling: as in `kdx.compare`."""

    target: Labels
    sampling: Sampling

    def scores(self, layer: str, features: Mapping[str, Source], sums: Iterable[Sequence[Tensor]] | None = None) -> LayerScores:
        """The scores. sums: those of all blocks, or their total, if they are known."""
        roles = roles_among(features)
        permuted = permuted_among(roles)
        products = inner_products(self._named(layer, features), self._names(layer, permuted), self.sampling, sums=sums)
        for explained, other in pairs_among(roles).values():
            check_residual(products, roles.index(explained), roles.index(other))
        return pooled_scores(
            products.products,
            {role: products.permuted[name] for role, name in zip(permuted, self._names(layer, permuted), strict=True)},
            products.moments,
            n=products.n,
            batches=products.batches,
            confidence=self.sampling.confidence,
            roles=roles,
        )

    def blocks(self, layer: str, features: Mapping[str, Source]) -> int | None:
        """The number of blocks of tiles; None if the layer is measured without tiles."""
        return block_count(self._named(layer, features), self.sampling)

    def sweep(self, layer: str, features: Mapping[str, Source]) -> Sweep:
        """The sums of the blocks."""
        sweep = sweep_of(self._named(layer, features), self._names(layer, permuted_among(roles_among(features))), self.sampling)
        assert sweep is not None, "only layers in tiles have blocks"
        return sweep

    def _named(self, layer: str, features: Mapping[str, Source]) -> dict[str, Rows | Labels]:
        roles = roles_among(features)
        rows = {name: rows_of(features[role], name) for role, name in zip(roles, self._names(layer, roles), strict=True)}
        return {**rows, TARGET: self.target}

    @staticmethod
    def _names(layer: str, roles: Iterable[str]) -> list[str]:
        return [role if role == TARGET else f"{role}'s features at {layer}" for role in roles]
