"""Maps and inner products of one layer and one batch on a GPU, without waiting for it.

`kdx.explain.layer.measure` reads a number from the GPU wherever it checks features, and the GPU is idle meanwhile. Here the numbers that
the checks need are collected in one tensor, which the caller reads later. If it shows that the features are unusual, `measure` measures
them again, step by step, and raises the error or handles the unusual features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.features import arrays
from kdx.kernels import fused, fused_maps, fused_sums, geometry, moments, rounding
from kdx.kernels.distances import ORDINARY
from kdx.kernels.fused_shares import MEAN_POSITIONS, PositionSquares
from kdx.kernels.moments import Moments
from kdx.roles import TARGET, mapped_among, maps_among, permuted_among, roles_among, shares_among

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class FusedMeasurement:
    """The tensors of a `kdx.explain.layer.LayerMeasurement` on the device, which may not have computed them yet.

    maps: the maps [n, H, W] and the channel weights [n, C] by name. numbers: the numbers that `scores` needs, float64. limits: the rounding
    of each role's features, in the order of MEASURED.
    """

    maps: dict[str, tuple[Tensor, Tensor]]
    shares: dict[tuple[str, str], Tensor]
    products: Tensor
    permuted: dict[str, Tensor]
    moments: Moments | None
    numbers: Tensor
    limits: tuple[float, ...]

    def scores(self, numbers: Sequence[float]) -> dict[str, float] | None:
        """The score of each map, from ``numbers``; None if the features are unusual; the results are then invalid."""
        n = next(iter(self.maps.values()))[0].shape[0]
        roles, maps = len(self.limits), len(self.maps)
        limits = np.array(self.limits)
        values = np.array(numbers, dtype=np.float64)
        squares, norms, left, scores, real = np.split(values, np.cumsum([roles, roles, maps, maps]))
        low, high = ORDINARY[torch.float32]
        # The largest of n^2 distances is at most the root of the sum of their squares, and at least this root over n.
        # NaN fails each comparison.
        is_usual = (
            ((np.sqrt(squares) >= low * n) & (np.sqrt(squares) <= high)).all()
            and (norms * (n * (n - 3)) > limits**2 * squares).all()
            and (left > limits.max()).all()
            and real.reshape(maps, n).any(1).all()
        )
        return dict(zip(self.maps, scores.tolist(), strict=True)) if is_usual else None


def applies(features: Mapping[str, Tensor]) -> bool:
    """Whether `measure_fused` computes features [n, C, H, W] of these roles on a GPU that runs the kernels."""
    among = maps_among(roles_among(features)).values()
    n = len(features["student"])
    return (
        moments.FEWEST < n <= moments.SINGLE_IMAGES
        and all(given is not None for _, given in among)
        and all(value.dtype in _TYPES for value in features.values())
    )


def measure_fused(
    features: Mapping[str, Tensor], target: Tensor, labels: Tensor | None, objective: ObjectiveName, permutations: Tensor, *, shares: bool
) -> FusedMeasurement:
    """`kdx.explain.layer.measure` of the maps of a batch with the weighting ``gap``, from each role's features [n, C, H, W] on a GPU.

    target: its distances [n, n]. labels: int64 [n] if the target is labels, else None.
    """
    roles = roles_among(features)
    among = maps_among(roles)
    device = target.device
    positions, known = _positions(features) if shares else ({}, {})
    raw = torch.stack([*(positions[role].distances if shares else _distances(features[role]) for role in roles), target])
    sums = fused.products(raw[None])
    centred = fused_sums.u_centered(raw, sums)

    maps: dict[str, tuple[Tensor, Tensor]] = {}
    left: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    real: dict[str, Tensor] = {}
    single = raw.float()
    means = {role: _means(features[role], known.get(role)) for role, _ in among.values()}
    for names in _alike({name: features[role] for name, (role, _) in among.items()}):
        explained = [among[name][0] for name in names]
        matrices = [place for name in names for place in (*(roles.index(role or "") for role in among[name]), len(roles))]
        stack = single.index_select(0, _indices(tuple(matrices), device)).unflatten(0, (-1, 3))
        solution = fused.product_weights(stack, torch.stack([means[role] for role in explained]), objective)
        first = features[explained[0]]
        weights = fused_maps.scaled_weights(solution.channel_weights, first.dtype, first[0, 0].numel())
        for place, (name, role) in enumerate(zip(names, explained, strict=True)):
            maps[name] = fused_maps.scaled_cam(features[role], weights, place), weights.plain[place]
            left[name], scores[name], real[name] = solution.left[place, None], solution.score[place, None], weights.real[place]

    by_name = [*(values[name] for values in (left, scores, real) for name in among)]
    numbers = torch.cat([sums.squares[0, : len(roles)], sums.inner[0].diagonal()[: len(roles)], *by_name])
    permuted = {
        name: fused_sums.permuted_label_products(centred, labels, permutations)
        if name == TARGET and labels is not None
        else fused_sums.permuted_products(centred, centred[-1 if name == TARGET else roles.index(name)], permutations)
        for name in permuted_among(roles)
    }
    influences = fused_sums.influences(centred)
    return FusedMeasurement(
        {name: maps[name] for name in among},
        _shares(features, positions, centred) if shares else {},
        sums.inner[0],
        permuted,
        None if influences is None else influences.moments(),
        numbers,
        tuple(arrays.rounding(features[role].flatten(1)) for role in roles),
    )


def _distances(features: Tensor) -> Tensor:
    """The distances [n, n] between images, in float64."""
    rows = geometry.wide(features.flatten(1))
    return fused.distances(rows - rows.mean(0)).double()


def _alike(features: Mapping[str, Tensor]) -> list[list[str]]:
    """The roles, grouped by the shape and the type of their features."""
    groups: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for name, value in features.items():
        groups.setdefault((value.shape, value.dtype), []).append(name)
    return list(groups.values())


def _positions(features: Mapping[str, Tensor]) -> tuple[dict[str, PositionSquares], dict[str, Tensor]]:
    """The geometry of each role's positions, and the spatial means of those roles with maps whose features have few positions."""
    roles = roles_among(features)
    explained = {role for role, _ in maps_among(roles).values()}
    few = {role for role in roles if role in explained and features[role][0, 0].numel() <= MEAN_POSITIONS}
    means = {
        role: torch.empty(len(value), value.shape[1] + rounding.PROBES, dtype=torch.float64, device=value.device)
        for role, value in features.items()
        if role in few
    }
    positions: dict[str, PositionSquares] = {}
    for names in _alike({role: features[role] for role in roles}):
        known = PositionSquares.of_each([features[role].flatten(2) for role in names], [means.get(role) for role in names])
        positions.update(zip(names, known, strict=True))
    return positions, means


def _means(features: Tensor, known: Tensor | None) -> Tensor:
    """The spatial means with probes [n, C + 8]. known: the same without probes, or None."""
    drawn = _drawn(len(features), features.device)
    return fused_maps.means_with_probes(features, drawn) if known is None else fused_maps.add_probes(known, features, drawn)


def _shares(features: Mapping[str, Tensor], positions: Mapping[str, PositionSquares], centred: Tensor) -> dict[tuple[str, str], Tensor]:
    """The shares of a `LayerMeasurement`, with the centred matrices [r + 1, n, n] of all roles and of the target."""
    roles, n = roles_among(features), centred.shape[1]
    places = {name: place for place, name in enumerate((*roles, TARGET))}
    contexts = [slice(0, n, 2), slice(1, n, 2)]
    result = {}
    for role in mapped_among(roles):
        names = [matrix for share_role, matrix in shares_among(roles) if share_role == role]
        matrices = centred.index_select(0, _indices(tuple(places[name] for name in names), centred.device))
        values = positions[role].shares(matrices, contexts) / (n * (n - 3))
        for name, value in zip(names, values.unbind(1), strict=True):
            result[role, name] = value.unflatten(2, features[role].shape[2:])
    return result


@cache
def _indices(places: tuple[int, ...], device: torch.device) -> Tensor:
    """These numbers on a device, where they are copied once. They are never freed, since a CUDA graph may read them."""
    return torch.tensor(places, device=device)


@cache
def _drawn(count: int, device: torch.device) -> Tensor:
    """The normal numbers of the probes on a device, where they are copied once. They are never freed, as above."""
    return rounding.drawn(count, 0).to(device)
