"""The geometry in PyTorch or in the CUDA kernels. Both backends have the same functions, whose results agree within rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.errors import KdxError
from kdx.kernels import cuda, fused, fused_maps, geometry
from kdx.kernels.cuda import Backend
from kdx.kernels.distances import of_any_magnitude
from kdx.kernels.fused_shares import PositionSquares
from kdx.kernels.positions import PositionGeometry, PositionProducts, positions_of_any_magnitude


@dataclass(frozen=True, eq=False)
class BatchDistances:
    """Distances between the images of a batch, and the same U-centred: both [..., n, n], float64."""

    raw: Tensor
    centred: Tensor

    def __getitem__(self, index: int) -> BatchDistances:
        """One matrix of a stack."""
        return BatchDistances(self.raw[index], self.centred[index])

    def select(self, indices: Sequence[int]) -> BatchDistances:
        """These matrices of a stack, as a stack."""
        return BatchDistances(torch.stack([self.raw[i] for i in indices]), torch.stack([self.centred[i] for i in indices]))


@dataclass(frozen=True, eq=False)
class ReferenceDistances:
    """Distances in reference mode, float64: ``inside`` the reference set [m, m], and as ``border`` [q, m] from each query to the set."""

    inside: Tensor
    border: Tensor

    @cached_property
    def raw(self) -> Tensor:
        """[q, m+1, m+1]: one matrix per query, which is the last row and column behind the references."""
        return geometry.bordered(self.inside, self.border)

    @cached_property
    def centred(self) -> Tensor:
        return geometry.u_centered(self.raw)


@dataclass(frozen=True, eq=False)
class UnicamWeights:
    """UniCAM's channel weights of s explained networks, each given another network.

    weights: s tensors [n, C], where C is each network's number of channels. score: the objective L, and residual_share: ||R||/||D||;
    both [s], or [s, q] in reference mode. laplacians: `geometry.laplacian` [s, n, n] or [s, q, m+1, m+1], None if not requested.
    """

    weights: list[Tensor]
    score: Tensor
    residual_share: Tensor
    laplacians: Tensor | None


class TorchBackend:
    """PyTorch, on any device."""

    def distances(self, x: Tensor) -> Tensor:
        """`geometry.distances`, in float64."""
        return geometry.distances(x)

    def centred_distances(self, x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor) -> Tensor:
        """`geometry.centred_distances`, in float64."""
        return geometry.centred_distances(x, y, x_norms, y_norms)

    def products(self, distances: BatchDistances) -> Tensor:
        """Inner products [b, k, k] of the U-centred matrices [b, k, n, n]."""
        return geometry.products(distances.centred)

    def channel_weights(
        self,
        explained: BatchDistances,
        given: BatchDistances | None,
        target: BatchDistances,
        means: Sequence[Tensor],
        objective: geometry.Objective,
        *,
        laplacians: bool,
    ) -> UnicamWeights:
        """Channel weights of s explained networks among the images of a batch.

        explained, given: stacks [s, n, n]; given is None for given nothing. target: [n, n]. means: the spatial means [n, C] of each
        explained network's features. laplacians: whether the result contains them.
        """
        b = None if given is None else given.centred
        solution = geometry.laplacian(explained.raw, explained.centred, b, target.centred, objective)
        weights = [geometry.gradient(lap, rows) for lap, rows in zip(solution.lap, means, strict=True)]
        return UnicamWeights(weights, solution.score, solution.left, solution.lap if laplacians else None)

    def query_channel_weights(
        self,
        explained: Sequence[ReferenceDistances],
        given: Sequence[ReferenceDistances] | None,
        target: ReferenceDistances,
        means: Sequence[Tensor],
        reference_means: Sequence[Tensor],
        objective: geometry.Objective,
        *,
        laplacians: bool,
    ) -> UnicamWeights:
        """Channel weights of s explained networks in reference mode.

        means, reference_means: the spatial means of each explained network's features, of the queries [q, C] and of the reference
        images [m, C]. The rest is as in `channel_weights`.
        """
        raw, centred = torch.stack([d.raw for d in explained]), torch.stack([d.centred for d in explained])
        b = None if given is None else torch.stack([d.centred for d in given])
        solution = geometry.laplacian(raw, centred, b, target.centred, objective)
        weights = [
            geometry.query_gradient(lap, queries, references)
            for lap, queries, references in zip(solution.lap, means, reference_means, strict=True)
        ]
        return UnicamWeights(weights, solution.score, solution.left, solution.lap if laplacians else None)

    def means(self, features: Tensor) -> Tensor:
        """`geometry.gap`, in float64."""
        return geometry.gap(features)

    def cam(self, features: Tensor, weights: Tensor) -> Tensor:
        """`geometry.cam`."""
        return geometry.cam(features, weights)

    def positions(self, features: Tensor) -> PositionGeometry:
        """The distances between images, and their shares of positions, of features [n, C, P]."""
        return positions_of_any_magnitude(PositionProducts.of, features)


class CudaBackend(TorchBackend):
    """The CUDA kernels. PyTorch computes what no kernel covers: float64, a user's own objective, given nothing, and Laplacians in
    reference mode."""

    def distances(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return super().distances(x)
        return of_any_magnitude(lambda rows: fused.distances(rows - rows.mean(-2, keepdim=True)).double(), geometry.wide(x))

    def centred_distances(self, x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return super().centred_distances(x, y, x_norms, y_norms)
        return fused.centred_distances(x, y, x_norms, y_norms).double()

    def products(self, distances: BatchDistances) -> Tensor:
        return fused.products(distances.raw).inner

    def channel_weights(
        self,
        explained: BatchDistances,
        given: BatchDistances | None,
        target: BatchDistances,
        means: Sequence[Tensor],
        objective: geometry.Objective,
        *,
        laplacians: bool,
    ) -> UnicamWeights:
        name = kernel_objective(objective)
        if name is None or given is None:
            return super().channel_weights(explained, given, target, means, objective, laplacians=laplacians)
        return _stacked_weights(explained.raw.float(), given.raw.float(), target.raw.float(), means, name, laplacians)

    def query_channel_weights(
        self,
        explained: Sequence[ReferenceDistances],
        given: Sequence[ReferenceDistances] | None,
        target: ReferenceDistances,
        means: Sequence[Tensor],
        reference_means: Sequence[Tensor],
        objective: geometry.Objective,
        *,
        laplacians: bool,
    ) -> UnicamWeights:
        name = kernel_objective(objective)
        if name is None or given is None or laplacians:
            return super().query_channel_weights(explained, given, target, means, reference_means, objective, laplacians=laplacians)
        results = [
            fused.query_weights(
                (x.inside.float(), y.inside.float(), target.inside.float()),
                (x.border.float(), y.border.float(), target.border.float()),
                queries,
                references,
                name,
            )
            for x, y, queries, references in zip(explained, given, means, reference_means, strict=True)
        ]
        score, share = (torch.stack(values) for values in zip(*((result.score, result.left) for result in results), strict=True))
        return UnicamWeights([result.channel_weights for result in results], score, share, None)

    def means(self, features: Tensor) -> Tensor:
        return super().means(features) if features.dtype == torch.float64 else fused_maps.means(features)

    def cam(self, features: Tensor, weights: Tensor) -> Tensor:
        return super().cam(features, weights) if features.dtype == torch.float64 else fused_maps.cam(features, weights)

    def positions(self, features: Tensor) -> PositionGeometry:
        return super().positions(features) if features.dtype == torch.float64 else positions_of_any_magnitude(PositionSquares.of, features)


def chosen(x: Tensor, backend: Backend = "auto") -> TorchBackend:
    """The backend for a call on features ``x``: the kernels for a CUDA tensor that they can run on, else PyTorch.

    ``torch`` and ``cuda`` choose by name. Raises KdxError for ``cuda`` where the kernels cannot run, and for ``cuda`` on float64.
    """
    if x.dtype == torch.float64:
        if backend == "cuda":
            raise KdxError("The CUDA kernels measure distances in float32, and these features are float64.", "Choose the backend torch.")
        return TorchBackend()
    return CudaBackend() if cuda.runs(x, backend) else TorchBackend()


def kernel_objective(objective: geometry.Objective) -> ObjectiveName | None:
    """The name of an objective that the kernels compute."""
    names: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
    return next((name for name in names if geometry.OBJECTIVES[name] is objective), None)


def _stacked_weights(
    explained: Tensor, given: Tensor, target: Tensor, means: Sequence[Tensor], objective: ObjectiveName, laplacians: bool
) -> UnicamWeights:
    """`TorchBackend.channel_weights` of float32 distances, by one launch for all networks with the same number of channels."""
    weights: list[Tensor] = [means[0]] * len(means)
    score, share = (means[0].new_empty(len(means)) for _ in range(2))
    laps = [means[0]] * len(means)
    for channels in {rows.shape[1] for rows in means}:
        networks = [i for i, rows in enumerate(means) if rows.shape[1] == channels]
        d, e, g, rows = (torch.stack([side[i] for i in networks]) for side in (explained, given, [target] * len(means), means))
        result = fused.weights(d, e, g, rows, objective, lap=laplacians)
        score[networks], share[networks] = result.score, result.left
        for place, i in enumerate(networks):
            weights[i] = result.channel_weights[place]
            if result.lap is not None:
                laps[i] = result.lap[place]
    return UnicamWeights(weights, score, share, torch.stack(laps) if laplacians else None)
