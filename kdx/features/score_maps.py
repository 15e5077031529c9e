"""Score maps as combinations of shares: the maps that add up to a score, from the shares of its numerator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdx.kernels import decomposition
from kdx.roles import SCORES, Definition, ScoreMap

Residuals = Mapping[tuple[str, str], Tensor]
"""|R|^2 [...] of the residual R of one matrix given another, by the names of the two."""


def coefficients(kind: ScoreMap, products: Tensor, names: Sequence[str], residuals: Residuals | None = None) -> tuple[Tensor, ...]:
    """The coefficient [...] of each share of this kind, from the inner products [..., k, k] of the matrices ``names``.

    With shares in the normalisation of the products, the sum over all images and positions of their combination equals the score.
    residuals: in the same normalisation; a float32 graph computes them from R itself. By default |R|^2 is a difference of products.
    """
    if kind.score in SCORES:
        return _coefficients(SCORES[kind.score], products, names, residuals)
    more, less = (_coefficients(SCORES[name], products, names, residuals) for name in kind.score.split(" - "))
    return *more, *(-value for value in less)


def _coefficients(definition: Definition, products: Tensor, names: Sequence[str], residuals: Residuals | None) -> tuple[Tensor, ...]:
    x, g, *given = (names.index(name) for name in definition.matrices)
    if not given:
        return (1 / (products[..., x, x] * products[..., g, g]).sqrt(),)
    (y,) = given
    beta = products[..., x, y] / products[..., y, y]
    squared = products[..., x, x] - beta * products[..., x, y] if residuals is None else residuals[names[x], names[y]]
    scale = 1 / (squared * products[..., g, g]).sqrt()
    return scale, -beta * scale


def terms(
    kind: ScoreMap,
    shares: Mapping[tuple[str, str], Tensor],
    products: Tensor,
    names: Sequence[str],
    residuals: Residuals | None = None,
) -> list[Tensor]:
    """The one or two terms [..., n, h, w] whose sum are the maps of this kind, on a grid that is as fine as all of them.

    shares [..., n, h, w] of each (role, matrix), in the normalisation of the inner products of the matrices ``names``. products: [k, k],
    or [n, k, k] if each image has its own. residuals: as in `coefficients`.
    """
    values = coefficients(kind, products, names, residuals)
    parts = [value[..., None, None] * shares[share] for value, share in zip(values, kind.shares, strict=True)]
    height, width = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    return [part if part.shape[-2:] == (height, width) else decomposition.spread(part, height, width) for part in parts]


def combined(
    kind: ScoreMap,
    shares: Mapping[tuple[str, str], Tensor],
    products: Tensor,
    names: Sequence[str],
    residuals: Residuals | None = None,
) -> Tensor:
    """The maps [..., n, h, w] of this kind: the sum of its `terms`."""
    return torch.stack(terms(kind, shares, products, names, residuals)).sum(0)
