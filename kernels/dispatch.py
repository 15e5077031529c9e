"""The geometry by PyTorch or by the CUDA kernels, chosen once a call: the same functions, the same results within their rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.errors import KdxError
from kdx.kernels import cuda, fused, geometry
from kdx.kernels.cuda import Backend


@dataclass(frozen=True)
class Pairs:
    """Distances of every pair of images [n, n]; in reference mode those ``inside`` a reference set [m, m] and, as ``border`` [q, m], of
    each query from the set. All float64."""

    inside: Tensor
    border: Tensor | None = None

    def matrices(self) -> Tensor:
        """[n, n], or [q, m+1, m+1] with each query behind the references."""
        return self.inside if self.border is None else geometry.bordered(self.inside, self.border)


@dataclass(frozen=True)
class Explained:
    """What UniCAM says of a stack of s explained networks.

    weights: s of [n, C], each network's own channels; score L and left = ||R||/||D||: [s], or [s, q] in reference mode; lap: as in
    `geometry.laplacian`, where it was asked for.
    """

    weights: list[Tensor]
    score: Tensor
    left: Tensor
    lap: Tensor | None


class TorchBackend:
    """By PyTorch, on any device."""

    def distances(self, x: Tensor) -> Tensor:
        """`geometry.distances`, in float64."""
        return geometry.distances(x)

    def centred_distances(self, x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor) -> Tensor:
        """`geometry.centred_distances`, in float64."""
        return geometry.centred_distances(x, y, x_norms, y_norms)

    def products(self, d: Tensor) -> Tensor:
        """Inner products [b, k, k] of the U-centred matrices of raw distances [b, k, n, n]."""
        return geometry.products(geometry.u_centered(d))

    def explained(
        self,
        d: Sequence[Pairs],
        given: Sequence[Pairs],
        target: Pairs,
        means: Sequence[Tensor],
        references: Sequence[Tensor] | None,
        objective: geometry.Objective,
        *,
        lap: bool,
    ) -> Explained:
        """Channel weights of s explained networks, one given network each, under one target.

        means: spatial means [n, C] of each explained network's features; references: the same of the reference set [m, C].
        """
        a, b = (torch.stack([pairs.matrices() for pairs in side]) for side in (d, given))
        u = geometry.u_centered
        found = geometry.laplacian(a, u(a), u(b), u(target.matrices()), objective)
        if references is None:
            weights = [geometry.gradient(*pair) for pair in zip(found.lap, means, strict=True)]
        else:
            weights = [geometry.query_gradient(*three) for three in zip(found.lap, means, references, strict=True)]
        return Explained(weights, found.score, found.left, found.lap if lap else None)

    def cam(self, features: Tensor, weights: Tensor) -> Tensor:
        """`geometry.cam`."""
        return geometry.cam(features, weights)


class CudaBackend(TorchBackend):
    """By the CUDA kernels; what they have no part in stays PyTorch's: float64, objectives of a user's own, Lap in reference mode."""

    def distances(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return super().distances(x)
        x = geometry.wide(x)
        return fused.distances(x - x.mean(-2, keepdim=True)).double()

    def centred_distances(self, x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return super().centred_distances(x, y, x_norms, y_norms)
        return fused.centred_distances(x, y, x_norms, y_norms).double()

    def products(self, d: Tensor) -> Tensor:
        return fused.products(d).inner

    def explained(
        self,
        d: Sequence[Pairs],
        given: Sequence[Pairs],
        target: Pairs,
        means: Sequence[Tensor],
        references: Sequence[Tensor] | None,
        objective: geometry.Objective,
        *,
        lap: bool,
    ) -> Explained:
        names: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
        name = next((name for name in names if geometry.OBJECTIVES[name] is objective), None)
        if name is None or (lap and references is not None):
            return super().explained(d, given, target, means, references, objective, lap=lap)
        if references is None:
            return _stacked(d, given, target, means, name, lap)
        each = [
            fused.query_weights(
                _float32(x.inside, y.inside, target.inside), _float32(x.border, y.border, target.border), queries, behind, name
            )
            for x, y, queries, behind in zip(d, given, means, references, strict=True)
        ]
        score, left = (torch.stack(values) for values in zip(*((found.score, found.left) for found in each), strict=True))
        return Explained([found.channel_weights for found in each], score, left, None)

    def cam(self, features: Tensor, weights: Tensor) -> Tensor:
        return super().cam(features, weights) if features.dtype == torch.float64 else fused.cam(features, weights)


def chosen(x: Tensor, backend: Backend = "auto") -> TorchBackend:
    """What computes a call on ``x``: the kernels on a CUDA tensor that they can run on, else PyTorch.

    ``torch`` and ``cuda`` choose by name; KdxError where the kernels cannot run, as on float64.
    """
    if x.dtype == torch.float64:
        if backend == "cuda":
            raise KdxError("The CUDA kernels measure distances in float32, and these features are float64.", "Choose the backend torch.")
        return TorchBackend()
    return CudaBackend() if cuda.runs(x, backend) else TorchBackend()


def _stacked(
    d: Sequence[Pairs], given: Sequence[Pairs], target: Pairs, means: Sequence[Tensor], objective: ObjectiveName, lap: bool
) -> Explained:
    """One launch for all the networks that have the same number of channels."""
    weights: list[Tensor] = [means[0]] * len(d)
    score, left = (means[0].new_empty(len(d)) for _ in range(2))
    laps = [means[0]] * len(d)
    for channels in {rows.shape[1] for rows in means}:
        which = [i for i, rows in enumerate(means) if rows.shape[1] == channels]
        x, y, g = (torch.stack([side[i].inside for i in which]).float() for side in (d, given, [target] * len(d)))
        found = fused.weights(x, y, g, torch.stack([means[i] for i in which]), objective, lap=lap)
        score[which], left[which] = found.score, found.left
        for place, i in enumerate(which):
            weights[i] = found.channel_weights[place]
            if found.lap is not None:
                laps[i] = found.lap[place]
    return Explained(weights, score, left, torch.stack(laps) if lap else None)


def _float32(a: Tensor | None, b: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    assert a is not None and b is not None and c is not None
    return a.float(), b.float(), c.float()
